"""The data of a skipped optimizer step on one rank, as plain arrays to save and inspect."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from workers.data.batching import Rows
from workers.data.samples import RaggedArray, Sample

Arrays = dict[str, np.ndarray]


def token_rows(rows: Sequence[Sample], prefix: str = "") -> Arrays:
    """Row i is ids[offsets[i]:offsets[i + 1]]; its first prompt_lengths[i] ids are the prompt. `loss_masks` [all ids] is True for
    trained tokens."""
    ids = RaggedArray.of([row.ids for row in rows], np.int32)
    return {
        f"{prefix}ids": ids.values,
        f"{prefix}offsets": ids.offsets,
        f"{prefix}prompt_lengths": np.array([row.prompt_length for row in rows], np.int32),
        f"{prefix}loss_masks": RaggedArray.of([row.loss_mask for row in rows], np.bool_).values,
    }


def micro_batch_numbers(micro_batches: list[Rows]) -> np.ndarray:
    """[rows] the micro-batch number of each row; rows are in micro-batch order."""
    return np.repeat(np.arange(len(micro_batches)), [len(rows) for rows in micro_batches])
