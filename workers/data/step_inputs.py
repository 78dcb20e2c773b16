"""What the driver asks of a rank: which samples or rows, cut into which micro-batches. Indices and counts, no tokens.

All ranks get the same number of micro-batches. An empty one is padding (workers.data.batching). Counts are those of the whole
batch, over all ranks, so that neither padding nor the number of ranks changes a mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from workers.data.batching import Rows
from workers.data.samples import SampleRefs


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
    """Answer tokens."""
    sequences: int
    prompts: int
    """Draws of prompts that they answer."""
    ptx: SupervisedBatch | None = None
    """Demonstrations learned beside it."""


@dataclass(frozen=True)
class TrainStepInput:
    """One rank's part of a PPO step."""

    rollouts: SampleRefs
    reference: SampleRefs
    """The reference's log-probabilities."""
    values: SampleRefs | None
    """The critic's values."""
    scores: np.ndarray
    """[samples] as they are trained on."""
    groups: np.ndarray
    """[samples] ids of the draws of prompts that they answer."""
    prompt_tokens: np.ndarray
    """[samples] answer tokens of the sample's group in its mini-batch, over all ranks."""
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
    """What the driver learns of a chunk of answers."""

    prompt_lengths: np.ndarray
    answer_lengths: np.ndarray
    ended: np.ndarray
    """Which answers ended by themselves (eos)."""
    version: int
    """Policy version of every token."""


class DifferentModel(RuntimeError):
    """A model that should be the trainer's computes something else."""


class StaleWeights(RuntimeError):
    """An engine's weights are not those that the trainer published."""
