"""The data sent between workers: ragged arrays in Ray's object store, and the driver's references to their rows.

An engine stores the samples of one call as one `RolloutBatch`; a scoring rank stores one `RaggedArray`. The driver keeps
`SampleRefs`: the object and the row of each sample. A worker that receives them fetches the objects (shared memory, no copy on
the same node) and reads its rows.
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
    """Token ids, some of them trained: a prompt and its response, or a conversation with several responses."""

    ids: np.ndarray
    """[length] int32; includes end tokens, unless the text was cut off."""
    loss_mask: np.ndarray
    """[length] bool: trained tokens. There may be gaps. The first token is never trained: no token predicts it."""
    log_probs: np.ndarray = field(default_factory=lambda: _NO_NUMBERS)
    """[trained] float32: the engine's, at the sampling temperature; empty if no engine generated the tokens."""
    versions: np.ndarray = field(default_factory=lambda: _NO_VERSIONS)
    """[trained] int32: policy version that generated each trained token; empty if no engine did."""

    @classmethod
    def of(
        cls,
        prompt: npt.ArrayLike,
        response: npt.ArrayLike,
        log_probs: npt.ArrayLike = _NO_NUMBERS,
        version: int | None = None,
    ) -> Sample:
        """A sample from the ids of a prompt and of a response; every response token is trained."""
        start, end = np.asarray(prompt, np.int32), np.asarray(response, np.int32)
        mask = np.arange(len(start) + len(end)) >= len(start)
        versions = _NO_VERSIONS if version is None else np.full(len(end), version, np.int32)
        return cls(np.concatenate([start, end]), mask, np.asarray(log_probs, np.float32), versions)

    @property
    def prompt_length(self) -> int:
        """Number of tokens before the first trained token."""
        trained = np.flatnonzero(self.loss_mask)
        return int(trained[0]) if len(trained) else len(self.ids)


@dataclass(frozen=True)
class RolloutBatch:
    """Samples as an engine generated them: token ids and log-probabilities, never text."""

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
    """Location of each sample: sample i is row where[i, 1] of the object refs[where[i, 0]]."""

    refs: tuple[ObjectRef, ...]
    where: np.ndarray
    """[samples, 2] int32"""

    @classmethod
    def of(cls, refs: Sequence[ObjectRef], samples: Sequence[np.ndarray], count: int) -> SampleRefs:
        """The rows of refs[k] are the samples `samples[k]`, in this order; `count` samples in total."""
        where = np.empty((count, 2), np.int32)
        for part, indices in enumerate(samples):
            where[indices, 0] = part
            where[indices, 1] = np.arange(len(indices))
        return cls(tuple(refs), where)

    def take(self, samples: np.ndarray) -> SampleRefs:
        """References to some of the samples, without the objects that these do not need."""
        parts, new = np.unique(self.where[samples, 0], return_inverse=True)
        where = np.stack([new, self.where[samples, 1]], axis=1).astype(np.int32)
        return SampleRefs(tuple(self.refs[p] for p in parts), where)

    def fetch(self) -> list[Any]:
        """The rows; called in a worker."""
        objects = ray.get(list(self.refs)) if self.refs else []
        return [objects[part].row(row) for part, row in self.where]

    def __len__(self) -> int:
        return len(self.where)
