"""Probes: random tokens and the trainer's outputs for them, which an engine or an exported model must reproduce.

Checksums do not prove what a model computes: an engine may keep packed copies of the old weights, and an exported file may be
read differently from how it was written.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from workers.data import Sample
from workers.data.step_inputs import DifferentModel

FILE = "probe.json"
"""File of an exported folder: the trainer's outputs for the probe."""
ROWS, LENGTH = 2, 24
"""Sequences of a probe, and tokens of each: few enough to cost nothing, many enough to reach most of a model."""


@dataclass(frozen=True)
class Probe:
    """Random token ids, and a model's outputs for them."""

    ids: np.ndarray
    """[rows, length] int32"""
    values: np.ndarray
    """float32: log-probabilities [rows, length - 1] of the tokens after the first, or the scores [rows] of a scalar model."""
    seconds: float = 0.0
    """Time that it took to compute them."""

    def gap(self, values: np.ndarray) -> float:
        """Mean |difference| from another model's values; nan where any is nan, 0 where there are no values."""
        if not self.values.size:
            return 0.0
        return float(np.abs(self.values.astype(np.float64) - values).mean())

    def require(self, values: np.ndarray, bound: float, who: str) -> float:
        """The gap. Raises DifferentModel, with the gap and the bound, where it is above `bound`."""
        gap = self.gap(values)
        if not gap <= bound:
            kind = "log-probabilities" if self.values.ndim > 1 else "scores"
            raise DifferentModel(
                f"{who} does not compute what the trainer computes: their {kind} of the same {self.ids.size} tokens differ by "
                f"{gap:.3g} in the mean, and {bound:g} is allowed (verify.float32, verify.bfloat16)"
            )
        return gap

    def within(self, longest: int) -> Probe:
        """The probe with its rows cut to `longest` tokens; for log-probabilities only."""
        return Probe(self.ids[:, :longest], self.values[:, : max(longest - 1, 0)])

    def save(self, folder: Path) -> None:
        content = {"ids": self.ids.tolist(), "values": self.values.tolist()}
        (folder / FILE).write_text(json.dumps(content), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Probe | None:
        """The probe of an exported folder; None where it has none."""
        if not (folder / FILE).is_file():
            return None
        content = json.loads((folder / FILE).read_text(encoding="utf-8"))
        return cls(np.array(content["ids"], np.int32), np.array(content["values"], np.float32))


def draw(vocabulary: int, length: int, *seed: int) -> np.ndarray:
    """[rows, length] int32 random ids. They differ by seed, so that a run's probes reach all of a model's experts."""
    return np.random.default_rng(seed).integers(0, vocabulary, (ROWS, length), np.int32)


def sequences(ids: np.ndarray) -> list[Sample]:
    """The rows as samples: all tokens but the first are scored."""
    return [Sample.of(row[:1], row[1:]) for row in ids]
