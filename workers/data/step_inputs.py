"""The driver's inputs for a rank: samples or rows, split into micro-batches. Indices and counts, no tokens.

All ranks get the same number of micro-batches. An empty one is padding (workers.data.batching). Counts are of the whole batch,
over all ranks, so padding and the number of ranks do not change a mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from workers.data.batching import Rows
from workers.data.samples import Sample, SampleRefs


@dataclass(frozen=True)
class SupervisedBatch:
    """One rank's part of a batch of dataset rows (demonstrations or preferences)."""

    data: str
    """Name of the dataset."""
    micro_batches: list[Rows]
    """Rows of the dataset."""
    count: int
    """Completion tokens (or pairs) of the whole batch, over all ranks: the divisor of its loss."""


@dataclass(frozen=True)
class KLTerm:
    """The step's penalty on KL(actor | reference). A coefficient of 0: not applied there."""

    estimator: Literal["k1", "k2", "k3"] = "k1"
    reward_coefficient: float = 0.0
    """Coefficient of the penalty that is subtracted from each token's reward."""
    loss_coefficient: float = 0.0
    """Coefficient of the penalty that is added to each token's loss."""


@dataclass(frozen=True)
class MiniBatch:
    """One rank's part of a mini-batch of answers. Counts are of the whole mini-batch, over all ranks."""

    micro_batches: list[Rows]
    """Rows among the rank's samples."""
    tokens: int
    """Trained tokens."""
    sequences: int
    prompts: int
    """Prompt draws that they answer."""
    ptx: SupervisedBatch | None = None
    """Demonstrations in the same optimizer step."""


@dataclass(frozen=True)
class TrainStepInput:
    """One rank's part of a PPO step."""

    rollouts: SampleRefs
    reference: SampleRefs | None
    """The reference's log-probabilities; None if no role of the step needs them."""
    values: SampleRefs | None
    """The critic's values."""
    scores: np.ndarray
    """[samples] shaped scores."""
    groups: np.ndarray
    """[samples] ids of the prompt draws that they answer."""
    prompt_tokens: np.ndarray
    """[samples] trained tokens of the sample's group in its mini-batch, over all ranks."""
    kl: KLTerm
    mini_batches: list[MiniBatch]
    advantages: np.ndarray | None = None
    """[samples] per answer; None: the worker computes advantages per token."""
    update: bool = True
    """Whether the weights may change."""


@dataclass(frozen=True)
class ScoringRequest:
    """Information on the answers that a rank of the reward role scores. Arrays are [samples]."""

    data: str
    """Name of the prompts' dataset."""
    prompts: np.ndarray
    """Rows of the dataset."""
    numbers: np.ndarray
    """Number of the answer among the answers to its prompt, from 0."""
    ended: np.ndarray
    """Answers that ended with an end token, not at the length limit."""
    step: int
    """0: an evaluation."""


@dataclass(frozen=True)
class RolloutInfo:
    """The driver's information on the samples of a RolloutBatch. Arrays are [samples]."""

    prompt_lengths: np.ndarray
    answer_lengths: np.ndarray
    """Tokens after the prompt."""
    trained_tokens: np.ndarray
    """Trained tokens among them."""
    ended: np.ndarray
    """Answers that ended with an end token (eos), not at the length limit."""
    min_versions: np.ndarray
    """Oldest policy version among the trained tokens."""
    max_versions: np.ndarray
    """Newest policy version among them."""

    @classmethod
    def of(cls, samples: Sequence[Sample], ended: Sequence[bool]) -> RolloutInfo:
        prompt_lengths = np.array([sample.prompt_length for sample in samples], np.int32)
        return cls(
            prompt_lengths=prompt_lengths,
            answer_lengths=np.array([len(sample.ids) for sample in samples], np.int32) - prompt_lengths,
            trained_tokens=np.array([sample.loss_mask.sum() for sample in samples], np.int32),
            ended=np.array(ended, np.bool_),
            min_versions=np.array([sample.versions.min() for sample in samples], np.int32),
            max_versions=np.array([sample.versions.max() for sample in samples], np.int32),
        )


class DifferentModel(RuntimeError):
    """A copy of the trainer's model computes different outputs."""


class StaleWeights(RuntimeError):
    """An engine's weights are not those of the trainer's last update."""
