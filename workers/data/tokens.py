"""Tokenised rows, as workers train on them, and counts of kept, cut and dropped rows."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from workers.data.samples import RaggedArray


@dataclass(frozen=True, eq=False, slots=True)
class Sequence:
    """A prompt with its answer, or a conversation with several answers."""

    ids: npt.NDArray[np.int32]
    """[length] with the end tokens, unless they were cut off."""
    prompt_length: int
    """Number of tokens before the first one that is learnt or scored."""
    loss_mask: npt.NDArray[np.bool_]
    """[length - prompt_length] which of the tokens after the prompt are learnt: those of the assistant."""

    @classmethod
    def of(cls, prompt: npt.ArrayLike, answer: npt.ArrayLike) -> Sequence:
        """A prompt, and an answer of which every token is learnt."""
        start, end = np.asarray(prompt, np.int32), np.asarray(answer, np.int32)
        return cls(np.concatenate([start, end]), len(start), np.ones(len(end), np.bool_))


@dataclass(frozen=True)
class Preference:
    """A tokenised pair."""

    chosen: Sequence
    rejected: Sequence
    margin: float


@dataclass(frozen=True)
class Sequences:
    """Tokenised sequences, concatenated in a few arrays, which are cheap to send and to share."""

    ids: RaggedArray
    """int32"""
    prompt_lengths: np.ndarray
    """[rows] int32"""
    loss_masks: RaggedArray
    """bool, of each row's tokens after the prompt"""

    @classmethod
    def of(cls, rows: Items[Sequence]) -> Sequences:
        return cls(
            RaggedArray.of([row.ids for row in rows], np.int32),
            np.array([row.prompt_length for row in rows], np.int32),
            RaggedArray.of([row.loss_mask for row in rows], np.bool_),
        )

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Sequence:
        return Sequence(self.ids.row(index), int(self.prompt_lengths[index]), self.loss_masks.row(index))

    @property
    def lengths(self) -> np.ndarray:
        """[rows] tokens of each row."""
        return np.diff(self.ids.offsets)

    @property
    def learnt(self) -> np.ndarray:
        """[rows] learnt tokens of each row, except a row's first token, which nothing predicts."""
        masks = self.loss_masks
        sums = np.concatenate([[0], np.cumsum(masks.values)])
        learnt = sums[masks.offsets[1:]] - sums[masks.offsets[:-1]]
        first = np.flatnonzero((self.prompt_lengths == 0) & (np.diff(masks.offsets) > 0))
        learnt[first] -= masks.values[masks.offsets[first]]
        return learnt


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
