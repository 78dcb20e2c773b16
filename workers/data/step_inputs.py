"""What the driver asks of a rank: which samples or rows, cut into which micro-batches. Indices and counts, no tokens.

All ranks get the same number of micro-batches. An empty one is padding (workers.data.batching). Counts are those of the whole
batch, over all ranks, so that neither padding nor the number of ranks changes a mean.
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
    """Completion tokens (or pairs) of the whole batch, over all ranks: what its loss is divided by."""


@dataclass(frozen=True)
class KLTerm:
    """The step's penalty on KL(actor | reference): where it applies, and how much. A coefficient of 0: not there."""

    estimator: Literal["k1", "k2", "k3"] = "k1"
    reward_coefficient: float = 0.0
    """Of what is taken from each token's reward."""
    loss_coefficient: float = 0.0
    """Of what is added to each token's loss."""


@dataclass(frozen=True)
class MiniBatch:
    """One rank's part of a mini-batch of answers. Counts are of the whole mini-batch, over all ranks."""

    micro_batches: list[Rows]
    """Rows among the rank's samples."""
    tokens: int
    """Trained tokens."""
    sequences: int
    prompts: int
    """Draws of prompts that they answer."""
    ptx: SupervisedBatch | None = None
    """Demonstrations learned beside it."""


@dataclass(frozen=True)
class TrainStepInput:
    """One rank's part of a PPO step."""

    rollouts: SampleRefs
    reference: SampleRefs | None
    """The reference's log-probabilities; None: no role of the step needs them."""
    values: SampleRefs | None
    """The critic's values."""
    scores: np.ndarray
    """[samples] as they are trained on."""
    groups: np.ndarray
    """[samples] ids of the draws of prompts that they answer."""
    prompt_tokens: np.ndarray
    """[samples] trained tokens of the sample's group in its mini-batch, over all ranks."""
    kl: KLTerm
    mini_batches: list[MiniBatch]
    advantages: np.ndarray | None = None
    """[samples] per answer; None: the worker estimates them per token."""
    update: bool = True
    """Whether the weights may change."""


@dataclass(frozen=True)
class ScoringRequest:
    """What a rank of the reward role is told of the answers that it scores. Arrays are [samples]."""

    data: str
    """Name of the prompts' dataset."""
    prompts: np.ndarray
    """Rows of the dataset."""
    numbers: np.ndarray
    """Of the answers to its prompt, which one each is, from 0."""
    ended: np.ndarray
    """Which answers ended by themselves."""
    step: int
    """0: of an evaluation."""


@dataclass(frozen=True)
class RolloutInfo:
    """What the driver learns of the samples of a RolloutBatch. Arrays are [samples]."""

    prompt_lengths: np.ndarray
    answer_lengths: np.ndarray
    """Tokens after the prompt."""
    trained_tokens: np.ndarray
    """Of these, tokens that are trained on."""
    ended: np.ndarray
    """Which answers ended by themselves (eos)."""
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
    """A model that should be the trainer's computes something else."""


class StaleWeights(RuntimeError):
    """An engine's weights are not those that the trainer published."""
