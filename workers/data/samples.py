"""What travels between workers: ragged arrays in Ray's object store, and the driver's references to their rows.

An engine puts the answers of one call into the store as one `Chunk`; a scoring rank puts one `Ragged` column. The driver
keeps a `Placed`: for each sample, which object holds it and in which row. A worker that is handed a `Placed` fetches the
objects (shared memory, no copy on the same node) and reads its rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
from ray import ObjectRef


@dataclass(frozen=True)
class RaggedArray:
    """Rows of unequal length, end to end."""

    values: np.ndarray
    """[total]"""
    offsets: np.ndarray
    """[rows + 1] int64; row i is values[offsets[i]:offsets[i + 1]]."""

    @classmethod
    def of(cls, rows: Sequence[np.ndarray], dtype: Any) -> RaggedArray:
        lengths = [len(row) for row in rows]
        values = np.concatenate([np.asarray(row, dtype) for row in rows]) if rows else np.empty(0, dtype)
        return cls(values, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))

    def row(self, index: int) -> np.ndarray:
        return self.values[self.offsets[index] : self.offsets[index + 1]]

    def __len__(self) -> int:
        return len(self.offsets) - 1


@dataclass(frozen=True)
class RolloutBatch:
    """Answers as an engine wrote them: token ids and their log-probabilities, never text."""

    tokens: RaggedArray
    """int32, prompt and answer."""
    log_probs: RaggedArray
    """float32, of the answer's tokens under the sampling temperature."""
    prompt_lengths: np.ndarray
    """[rows] int32"""

    def row(self, index: int) -> Sample:
        return Sample(self.tokens.row(index), int(self.prompt_lengths[index]), self.log_probs.row(index))


@dataclass(frozen=True)
class Sample:
    """One prompt with its answer."""

    ids: np.ndarray
    """[length] int32, prompt and answer."""
    prompt_length: int
    log_probs: np.ndarray
    """[answer] float32"""

    @property
    def loss_mask(self) -> np.ndarray:
        """[answer] which of the answer's tokens are trained on: all of them."""
        return np.ones(len(self.ids) - self.prompt_length, np.bool_)


@dataclass(frozen=True)
class SampleRefs:
    """Where each sample's row lies: sample i is row where[i, 1] of the object refs[where[i, 0]]."""

    refs: tuple[ObjectRef, ...]
    where: np.ndarray
    """[samples, 2] int32"""

    @classmethod
    def of(cls, refs: Sequence[ObjectRef], samples: Sequence[np.ndarray], count: int) -> SampleRefs:
        """Rows of refs[k] are the samples `samples[k]`, in that order; `count` samples in all."""
        where = np.empty((count, 2), np.int32)
        for part, indices in enumerate(samples):
            where[indices, 0] = part
            where[indices, 1] = np.arange(len(indices))
        return cls(tuple(refs), where)

    def take(self, samples: np.ndarray) -> SampleRefs:
        """The same for some samples, with only the references that they need."""
        parts, new = np.unique(self.where[samples, 0], return_inverse=True)
        where = np.stack([new, self.where[samples, 1]], axis=1).astype(np.int32)
        return SampleRefs(tuple(self.refs[p] for p in parts), where)

    def fetch(self) -> list[Any]:
        """The rows themselves; called in a worker."""
        objects = ray.get(list(self.refs)) if self.refs else []
        return [objects[part].row(row) for part, row in self.where]

    def __len__(self) -> int:
        return len(self.where)
