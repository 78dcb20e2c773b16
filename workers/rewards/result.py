"""What a source of rewards says of some answers: of each a score, a timeout or an error."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np

from workers.data.batching import Rows, spans

Value = float | str | None
"""A score, None where there is none, or the text of what is no number."""

_FAULTS_KEPT = 8
"""Reasons that are told of one call: a function may have one of its own for each answer."""
_NUMBERS_KEPT = 32
"""Metrics of its own that a source may have."""


@dataclass(frozen=True)
class Fault:
    """Why some answers have no score."""

    why: str
    samples: Rows
    """Which answers."""
    detail: str = ""
    """More than a line: a traceback, the answers themselves."""


@dataclass(frozen=True)
class RewardResult:
    """One source's word on some answers."""

    values: np.ndarray
    """float32 [samples]; nan: no score."""
    late: np.ndarray
    """bool [samples]: those that have no score because of a timeout."""
    faults: tuple[Fault, ...] = ()
    """Why those without a score have none, the first reasons."""
    numbers: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Name -> float32 [samples]: what else the source measures of each answer; nan where it does not."""

    @property
    def timeouts(self) -> int:
        """Samples that timed out."""
        return int(self.late.sum())

    @property
    def errors(self) -> int:
        """Samples that have no score for another reason."""
        return int((np.isnan(self.values) & ~self.late).sum())

    @property
    def example(self) -> str:
        """What happened to one of those without a score."""
        return self.faults[0].why if self.faults else ""

    def means(self, name: str) -> dict[str, float]:
        """Metrics: the mean of the scores under `name`, of each other number under `name/number`, over the answers that have
        them; what none has is left out."""
        found = {name: self.values, **{f"{name}/{number}": values for number, values in self.numbers.items()}}
        return {each: float(np.nanmean(values)) for each, values in found.items() if not np.isnan(values).all()}

    @classmethod
    def of(cls, values: Sequence[Value], numbers: Mapping[str, Sequence[Value]] | None = None) -> RewardResult:
        """One value per sample; what is no finite float32 is an error of that sample, and left out of `numbers`."""
        found = _floats(values)
        reasons: dict[str, list[int]] = {}
        for i in np.flatnonzero(np.isnan(found)).tolist():
            reasons.setdefault(f"gave {values[i]} for an answer; one finite number is needed", []).append(i)
        faults = [Fault(why, np.array(rows, np.intp)) for why, rows in list(reasons.items())[:_FAULTS_KEPT]]
        measured = {name: _floats(each) for name, each in list((numbers or {}).items())[:_NUMBERS_KEPT]}
        return cls(found, np.zeros(len(found), bool), tuple(faults), measured)

    @classmethod
    def nothing(cls, samples: int, why: str, late: bool = False, detail: str = "") -> RewardResult:
        """No score for any of them; late: because of a timeout. detail: more than a line about it."""
        faults = (Fault(why, np.arange(samples), detail),) if samples else ()
        return cls(np.full(samples, np.nan, np.float32), np.full(samples, late), faults)

    @classmethod
    def join(cls, parts: Sequence[RewardResult]) -> RewardResult:
        """One of all samples from those of consecutive batches of them."""
        ends = np.cumsum([0, *(len(part.values) for part in parts)])
        return cls.gather([np.arange(first, end) for first, end in pairwise(ends)], parts, int(ends[-1]))

    @classmethod
    def gather(cls, shards: Sequence[Rows], parts: Sequence[RewardResult], samples: int) -> RewardResult:
        """One of all samples from those of its shards (rows of each part)."""
        values, late = np.full(samples, np.nan, np.float32), np.zeros(samples, bool)
        names = list(dict.fromkeys(name for part in parts for name in part.numbers))[:_NUMBERS_KEPT]
        numbers = {name: np.full(samples, np.nan, np.float32) for name in names}
        faults: dict[str, Fault] = {}
        for rows, part in zip(shards, parts, strict=True):
            values[rows], late[rows] = part.values, part.late
            for name in part.numbers.keys() & numbers.keys():
                numbers[name][rows] = part.numbers[name]
            for fault in part.faults:
                known = faults.setdefault(fault.why, replace(fault, samples=np.empty(0, np.intp)))
                faults[fault.why] = replace(known, samples=np.union1d(known.samples, rows[fault.samples]))
        return cls(values, late, tuple(faults.values())[:_FAULTS_KEPT], numbers)


def _floats(values: Sequence[Value]) -> np.ndarray:
    """float32; nan where a value is no finite float32."""
    with np.errstate(over="ignore"):
        found = np.array([value if isinstance(value, float) else math.nan for value in values], np.float32)
    found[~np.isfinite(found)] = math.nan
    return found


def in_batches(
    prompts: Sequence[Any], answers: Sequence[str], columns: dict[str, list], samples: Sequence[Any] | None, size: int
) -> list[tuple[Sequence[Any], Sequence[str], dict[str, list], Sequence[Any] | None]]:
    """What a source is asked, `size` answers at a time. samples: records of the answers, where the source wants them."""
    return [
        (
            prompts[span],
            answers[span],
            {name: column[span] for name, column in columns.items()},
            None if samples is None else samples[span],
        )
        for span in spans(len(answers), size)
    ]
