"""Proof by computing: a few random tokens, and what a model makes of them.

Weights that arrived are not yet weights that compute: an engine may keep packed copies of the old ones, an exported file may be
read otherwise than it was written. So whoever serves or saves a trainer's model shows that it computes the same.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from workers.data import Sample
from workers.data.step_inputs import DifferentModel

FILE = "probe.json"
"""In an exported folder: what its model computed when it was trained."""
ROWS, LENGTH = 2, 24
"""Sequences of a probe, and tokens of each: few enough to cost nothing, many enough to reach most of a model."""


@dataclass(frozen=True)
class Probe:
    """Random token ids, and what a model says of them."""

    ids: np.ndarray
    """[rows, length] int32"""
    values: np.ndarray
    """float32: log-probabilities [rows, length - 1] of the tokens after the first, or the scores [rows] of a scalar model."""
    seconds: float = 0.0
    """What it took to compute them."""

    def gap(self, values: np.ndarray) -> float:
        """Mean |difference| from what another model says; nan where one of them is not a number, 0 where there is nothing."""
        if not self.values.size:
            return 0.0
        return float(np.abs(self.values.astype(np.float64) - values).mean())

    def require(self, values: np.ndarray, bound: float, who: str) -> float:
        """The gap, which is at most `bound`. Raises DifferentModel, which names both."""
        gap = self.gap(values)
        if not gap <= bound:
            kind = "log-probabilities" if self.values.ndim > 1 else "scores"
            raise DifferentModel(
                f"{who} does not compute what the trainer computes: their {kind} of the same {self.ids.size} tokens differ by "
                f"{gap:.3g} in the mean, and {bound:g} is allowed (verify.float32, verify.bfloat16)"
            )
        return gap

    def within(self, longest: int) -> Probe:
        """Its rows cut to so many tokens. Of scores there is none to cut."""
        return Probe(self.ids[:, :longest], self.values[:, : max(longest - 1, 0)])

    def save(self, folder: Path) -> None:
        content = {"ids": self.ids.tolist(), "values": self.values.tolist()}
        (folder / FILE).write_text(json.dumps(content), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Probe | None:
        """That of an exported folder; None where it has none."""
        if not (folder / FILE).is_file():
            return None
        content = json.loads((folder / FILE).read_text(encoding="utf-8"))
        return cls(np.array(content["ids"], np.int32), np.array(content["values"], np.float32))


def draw(vocabulary: int, length: int, *seed: int) -> np.ndarray:
    """[rows, length] int32 random ids; other ones for another seed, so that a run's probes reach all of a model's experts."""
    return np.random.default_rng(seed).integers(0, vocabulary, (ROWS, length), np.int32)


def sequences(ids: np.ndarray) -> list[Sample]:
    """The rows, of which all tokens but the first are scored."""
    return [Sample.of(row[:1], row[1:]) for row in ids]
