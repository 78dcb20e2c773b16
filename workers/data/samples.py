"""What travels between workers: ragged arrays in Ray's object store, and the driver's references to their rows.

An engine puts the samples of one call into the store as one `RolloutBatch`; a scoring rank puts one `RaggedArray`. The driver
keeps `SampleRefs`: for each sample, which object holds it and in which row. A worker that is handed them fetches the
objects (shared memory, no copy on the same node) and reads its rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
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


_NO_NUMBERS = np.empty(0, np.float32)
_NO_VERSIONS = np.empty(0, np.int32)


@dataclass(frozen=True, eq=False, slots=True)
class Sample:
    """Token ids of which some are trained on: a prompt and its response, or a conversation with several responses."""

    ids: np.ndarray
    """[length] int32; end tokens included, unless they were cut off."""
    loss_mask: np.ndarray
    """[length] bool: which tokens are trained on. There may be gaps; nothing predicts the first token, whatever stands there."""
    log_probs: np.ndarray = field(default_factory=lambda: _NO_NUMBERS)
    """[trained] float32: the engine's, under the sampling temperature; empty where no engine wrote the tokens."""
    versions: np.ndarray = field(default_factory=lambda: _NO_VERSIONS)
    """[trained] int32: policy version that wrote each trained token; empty where no engine did."""

    @classmethod
    def of(
        cls,
        prompt: npt.ArrayLike,
        response: npt.ArrayLike,
        log_probs: npt.ArrayLike = _NO_NUMBERS,
        version: int | None = None,
    ) -> Sample:
        """A prompt's ids and those of a response of which every token is trained on."""
        start, end = np.asarray(prompt, np.int32), np.asarray(response, np.int32)
        mask = np.arange(len(start) + len(end)) >= len(start)
        versions = _NO_VERSIONS if version is None else np.full(len(end), version, np.int32)
        return cls(np.concatenate([start, end]), mask, np.asarray(log_probs, np.float32), versions)

    @property
    def prompt_length(self) -> int:
        """Tokens before the first that is trained on."""
        trained = np.flatnonzero(self.loss_mask)
        return int(trained[0]) if len(trained) else len(self.ids)


@dataclass(frozen=True)
class RolloutBatch:
    """Samples as an engine wrote them: token ids and their log-probabilities, never text."""

    ids: RaggedArray
    """int32"""
    loss_masks: RaggedArray
    """bool, of each of the ids"""
    log_probs: RaggedArray
    """float32, of the trained tokens"""
    versions: RaggedArray
    """int32, of the trained tokens"""

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> RolloutBatch:
        return cls(
            RaggedArray.of([sample.ids for sample in samples], np.int32),
            RaggedArray.of([sample.loss_mask for sample in samples], np.bool_),
            RaggedArray.of([sample.log_probs for sample in samples], np.float32),
            RaggedArray.of([sample.versions for sample in samples], np.int32),
        )

    def row(self, index: int) -> Sample:
        return Sample(
            self.ids.row(index), self.loss_masks.row(index), self.log_probs.row(index), self.versions.row(index)
        )

    def __len__(self) -> int:
        return len(self.ids)


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
