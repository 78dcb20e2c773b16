"""Result of a source of rewards: for each answer a score, a timeout or an error."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np

from workers.data.batching import Rows, spans

Value = float | str | None
"""A score, None for no score, or the text of a value that is not a number."""

_FAULTS_KEPT = 8
"""Reasons that are reported per call: a function may give a different one for each answer."""
_NUMBERS_KEPT = 32
"""Further metrics that a source may report."""


@dataclass(frozen=True)
class Fault:
    """Why some answers have no score."""

    why: str
    samples: Rows
    """Which answers."""
    detail: str = ""
    """Longer text: a traceback, or the answers."""


@dataclass(frozen=True)
class RewardResult:
    """One source's scores of some answers."""

    values: np.ndarray
    """float32 [samples]; nan: no score."""
    timed_out: np.ndarray
    """bool [samples]: no score because of a timeout."""
    faults: tuple[Fault, ...] = ()
    """The first reasons for missing scores."""
    numbers: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Name -> float32 [samples]: further numbers of the source; nan where an answer has none."""

    @property
    def timeouts(self) -> int:
        """Samples that timed out."""
        return int(self.timed_out.sum())

    @property
    def errors(self) -> int:
        """Samples that have no score for another reason."""
        return int((np.isnan(self.values) & ~self.timed_out).sum())

    @property
    def example(self) -> str:
        """The reason of one missing score; empty where none is missing."""
        return self.faults[0].why if self.faults else ""

    def means(self, name: str) -> dict[str, float]:
        """Metrics: the mean score under `name` and the mean of each further number under `name/number`, over the answers that
        have one. A metric without any is left out."""
        columns = {name: self.values, **{f"{name}/{number}": values for number, values in self.numbers.items()}}
        return {each: float(np.nanmean(values)) for each, values in columns.items() if not np.isnan(values).all()}

    @classmethod
    def of(cls, values: Sequence[Value], numbers: Mapping[str, Sequence[Value]] | None = None) -> RewardResult:
        """One value per sample. A value that is not a finite float32 is an error of that sample; in `numbers` it is nan."""
        scores = _floats(values)
        reasons: dict[str, list[int]] = {}
        for i in np.flatnonzero(np.isnan(scores)).tolist():
            reasons.setdefault(f"gave {values[i]} for an answer; one finite number is needed", []).append(i)
        faults = [Fault(why, np.array(rows, np.intp)) for why, rows in list(reasons.items())[:_FAULTS_KEPT]]
        measured = {name: _floats(each) for name, each in list((numbers or {}).items())[:_NUMBERS_KEPT]}
        return cls(scores, np.zeros(len(scores), bool), tuple(faults), measured)

    @classmethod
    def nothing(cls, samples: int, why: str, timed_out: bool = False, detail: str = "") -> RewardResult:
        """No score for any sample. timed_out: because of a timeout. detail: longer text on the reason."""
        faults = (Fault(why, np.arange(samples), detail),) if samples else ()
        return cls(np.full(samples, np.nan, np.float32), np.full(samples, timed_out), faults)

    @classmethod
    def join(cls, parts: Sequence[RewardResult]) -> RewardResult:
        """The result of all samples from the results of consecutive batches."""
        ends = np.cumsum([0, *(len(part.values) for part in parts)])
        return cls.gather([np.arange(first, end) for first, end in pairwise(ends)], parts, int(ends[-1]))

    @classmethod
    def gather(cls, shards: Sequence[Rows], parts: Sequence[RewardResult], samples: int) -> RewardResult:
        """The result of all samples from the results of its shards. shards: samples of each part."""
        values, timed_out = np.full(samples, np.nan, np.float32), np.zeros(samples, bool)
        names = list(dict.fromkeys(name for part in parts for name in part.numbers))[:_NUMBERS_KEPT]
        numbers = {name: np.full(samples, np.nan, np.float32) for name in names}
        faults: dict[str, Fault] = {}
        for rows, part in zip(shards, parts, strict=True):
            values[rows], timed_out[rows] = part.values, part.timed_out
            for name in part.numbers.keys() & numbers.keys():
                numbers[name][rows] = part.numbers[name]
            for fault in part.faults:
                merged = faults.setdefault(fault.why, replace(fault, samples=np.empty(0, np.intp)))
                faults[fault.why] = replace(merged, samples=np.union1d(merged.samples, rows[fault.samples]))
        return cls(values, timed_out, tuple(faults.values())[:_FAULTS_KEPT], numbers)


def _floats(values: Sequence[Value]) -> np.ndarray:
    """float32; nan where a value is not a finite float32."""
    with np.errstate(over="ignore"):
        floats = np.array([value if isinstance(value, float) else math.nan for value in values], np.float32)
    floats[~np.isfinite(floats)] = math.nan
    return floats


def in_batches(
    prompts: Sequence[Any], answers: Sequence[str], columns: dict[str, list], samples: Sequence[Any] | None, size: int
) -> list[tuple[Sequence[Any], Sequence[str], dict[str, list], Sequence[Any] | None]]:
    """The arguments of each call of a source, `size` answers per call. samples: records of the answers, where it wants them."""
    return [
        (
            prompts[span],
            answers[span],
            {name: column[span] for name, column in columns.items()},
            None if samples is None else samples[span],
        )
        for span in spans(len(answers), size)
    ]
