"""What a source of rewards says of some answers: of each a score, a timeout or an error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from workers.batching import Rows, spans


@dataclass(frozen=True)
class Scored:
    """One source's word on some answers."""

    values: np.ndarray
    """float32 [samples]; nan: no score."""
    late: np.ndarray
    """bool [samples]: those that have no score because of a timeout."""
    example: str = ""
    """What happened to one of those without a score."""

    @property
    def timeouts(self) -> int:
        """Samples that timed out."""
        return int(self.late.sum())

    @property
    def errors(self) -> int:
        """Samples that have no score for another reason."""
        return int((np.isnan(self.values) & ~self.late).sum())

    @classmethod
    def of(cls, values: Sequence[float | str | None]) -> Scored:
        """One value per sample; what is no finite float32 is an error of that sample. Text stands for what was no number."""
        with np.errstate(over="ignore"):
            found = np.array([value if isinstance(value, float) else np.nan for value in values], np.float32)
        wrong = ~np.isfinite(found)
        found[wrong] = np.nan
        example = (
            f"gave {values[int(wrong.argmax())]} for an answer; one finite number is needed" if wrong.any() else ""
        )
        return cls(found, np.zeros(len(found), bool), example)

    @classmethod
    def nothing(cls, samples: int, why: str, late: bool = False) -> Scored:
        """No score for any of them; late: because of a timeout."""
        return cls(np.full(samples, np.nan, np.float32), np.full(samples, late), why)

    @classmethod
    def join(cls, parts: Sequence[Scored]) -> Scored:
        """One of all samples from those of consecutive batches of them."""
        ends = np.cumsum([0, *(len(part.values) for part in parts)])
        return cls.gather([np.arange(first, end) for first, end in pairwise(ends)], parts, int(ends[-1]))

    @classmethod
    def gather(cls, shards: Sequence[Rows], parts: Sequence[Scored], samples: int) -> Scored:
        """One of all samples from those of its shards (rows of each part)."""
        values, late = np.full(samples, np.nan, np.float32), np.zeros(samples, bool)
        for rows, part in zip(shards, parts, strict=True):
            values[rows], late[rows] = part.values, part.late
        return cls(values, late, next((part.example for part in parts if part.example), ""))


def in_batches(
    prompts: Sequence[Any], answers: Sequence[str], columns: dict[str, list], size: int
) -> list[tuple[Sequence[Any], Sequence[str], dict[str, list]]]:
    """What a source is asked, `size` answers at a time."""
    return [
        (prompts[span], answers[span], {name: column[span] for name, column in columns.items()})
        for span in spans(len(answers), size)
    ]
