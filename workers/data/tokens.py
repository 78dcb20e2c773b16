"""Tokenised rows, as workers train on them, and counts of kept, cut and dropped rows."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass

import numpy as np

from workers.data.samples import RaggedArray, Sample


@dataclass(frozen=True)
class Preference:
    """A tokenised pair."""

    chosen: Sample
    rejected: Sample
    margin: float


@dataclass(frozen=True)
class Sequences:
    """Tokenised sequences, concatenated in a few arrays, which are cheap to send and to share."""

    ids: RaggedArray
    """int32"""
    loss_masks: RaggedArray
    """bool, of each of the ids"""

    @classmethod
    def of(cls, rows: Items[Sample]) -> Sequences:
        return cls(
            RaggedArray.of([row.ids for row in rows], np.int32),
            RaggedArray.of([row.loss_mask for row in rows], np.bool_),
        )

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Sample:
        return Sample(self.ids.row(index), self.loss_masks.row(index))

    @property
    def lengths(self) -> np.ndarray:
        """[rows] tokens of each row."""
        return np.diff(self.ids.offsets)

    @property
    def learnt(self) -> np.ndarray:
        """[rows] tokens of each row whose log-probability is learnt; nothing predicts a row's first token."""
        mask, offsets = self.loss_masks.values.copy(), self.loss_masks.offsets
        mask[offsets[:-1][np.diff(offsets) > 0]] = False
        sums = np.concatenate([[0], np.cumsum(mask)])
        return sums[offsets[1:]] - sums[offsets[:-1]]


@dataclass(frozen=True)
class Preferences:
    """Tokenised pairs."""

    chosen: Sequences
    rejected: Sequences
    margins: np.ndarray
    """[pairs] float32"""

    def __len__(self) -> int:
        return len(self.margins)

    def __getitem__(self, index: int) -> Preference:
        return Preference(self.chosen[index], self.rejected[index], float(self.margins[index]))

    @property
    def lengths(self) -> np.ndarray:
        """[pairs] tokens of each pair's longer side."""
        return np.maximum(self.chosen.lengths, self.rejected.lengths)

    @property
    def learnt(self) -> np.ndarray:
        """[pairs] ones: a batch's loss is divided by its pairs."""
        return np.ones(len(self), np.int64)


@dataclass
class Counts:
    """Counts of a dataset's rows: read, kept, cut, dropped."""

    noun: str = "rows"
    """Noun for the rows in texts: rows, pairs or prompts."""
    rows: int = 0
    """Rows that were read."""
    kept: int = 0
    """Rows that are used."""
    cut: int = 0
    """Of these, rows that were too long and were shortened."""
    dropped: int = 0
    """Rows left out because they were too long."""
    equal: int = 0
    """Pairs left out because both sides have the same tokens."""
    longest: int = 0
    """Tokens of the longest row, before anything was cut."""
    tokens: int = 0
    """Tokens of all rows that are used."""
    learnt: int = 0
    """Of these, tokens that are learnt (of pairs: their number)."""
    conversations: int = 0
    """Rows that went through the chat template."""

    @property
    def form(self) -> str:
        """text, chat or mixed: whether rows went through the chat template."""
        return "text" if not self.conversations else "chat" if self.conversations == self.kept else "mixed"

    def describe(self) -> str:
        """`8,317 of 8,320 rows, 12 cut to length, 3 left out as too long, 204,310 tokens, longest 81`."""
        kept = f"{self.kept:,}" if self.kept == self.rows else f"{self.kept:,} of {self.rows:,}"
        parts = [f"{kept} {self.noun}"]
        for count, text in (
            (self.cut, "cut to length"),
            (self.dropped, "left out as too long"),
            (self.equal, "left out with two equal answers"),
        ):
            if count:
                parts.append(f"{count:,} {text}")
        return ", ".join([*parts, f"{self.tokens:,} tokens, longest {self.longest:,}"])
