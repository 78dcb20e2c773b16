"""What the driver holds of a step: references to objects in the object store, and a few numbers per response."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from workers.data.samples import SampleRefs
from workers.data.step_inputs import KLTerm


@dataclass(frozen=True)
class Rollouts:
    """A step's responses: references to their tokens, and the numbers that the driver needs. Arrays are [samples]."""

    data: str
    """Name of the dataset."""
    prompts: np.ndarray
    """Rows of the dataset."""
    groups: np.ndarray
    """Index of the prompt among the step's prompts, from 0. A prompt that is drawn twice has two groups."""
    numbers: np.ndarray
    """Index among the responses to the prompt, from 0."""
    step: int
    """0: an evaluation."""
    refs: SampleRefs
    prompt_lengths: np.ndarray
    answer_lengths: np.ndarray
    """Tokens after the prompt."""
    trained_tokens: np.ndarray
    """Of these, the tokens that the policy wrote; only they are trained on."""
    ended: np.ndarray
    """Whether the response ended by itself, not at the token limit."""
    min_versions: np.ndarray
    """Oldest policy version that wrote a token of the response."""
    max_versions: np.ndarray
    """Newest one."""

    @property
    def lengths(self) -> np.ndarray:
        return self.prompt_lengths + self.answer_lengths

    def __len__(self) -> int:
        return len(self.prompts)


@dataclass(frozen=True)
class TokenColumn:
    """References to a value per response token, and one number per response."""

    refs: SampleRefs
    per_answer: np.ndarray


@dataclass(frozen=True)
class Experience:
    """Scored rollouts."""

    rollouts: Rollouts
    reference: TokenColumn | None
    values: TokenColumn | None
    scores: np.ndarray
    """[samples] as they are trained on; nan: no score, the sample is not trained on."""
    kl: KLTerm
    advantages: np.ndarray | None = None
    """[samples] per response; None: workers estimate them per token."""
    ptx: list[np.ndarray] = field(default_factory=list)
    """Rows of demonstrations beside each mini-batch."""

    @property
    def scored(self) -> np.ndarray:
        """The samples that are trained on: those with a score."""
        return np.flatnonzero(~np.isnan(self.scores))


def kl_per_token(rollouts: Rollouts, reference: TokenColumn | None) -> np.ndarray:
    """[samples] each response's KL to the reference (estimator k1), in nats per token; nan without a reference."""
    if reference is None:
        return np.full(len(rollouts), np.nan)
    return np.asarray(reference.per_answer / rollouts.trained_tokens)
