"""What the driver holds of a step: references to where answers and numbers lie, and one or two numbers per answer."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from workers.data.samples import SampleRefs
from workers.data.step_inputs import KLTerm


@dataclass(frozen=True)
class Rollouts:
    """A step's answers: where they lie, and what the driver may know of them. Arrays are [samples]."""

    data: str
    prompts: np.ndarray
    """Rows of the dataset."""
    groups: np.ndarray
    """Which of the step's draws of prompts each answers, from 0. A prompt that is drawn twice makes two groups."""
    numbers: np.ndarray
    """Of the answers to its prompt, which one each is, from 0."""
    step: int
    """0: of an evaluation."""
    refs: SampleRefs
    prompt_lengths: np.ndarray
    answer_lengths: np.ndarray
    """Tokens after the prompt."""
    trained_tokens: np.ndarray
    """Of these, tokens that are trained on: those that the policy wrote."""
    ended: np.ndarray
    """Which answers ended by themselves."""
    min_versions: np.ndarray
    """Oldest policy version that wrote a token of the answer."""
    max_versions: np.ndarray
    """Newest one."""

    @property
    def lengths(self) -> np.ndarray:
        return self.prompt_lengths + self.answer_lengths

    def __len__(self) -> int:
        return len(self.prompts)


@dataclass(frozen=True)
class TokenColumn:
    """A value per answer token, where it lies, and one number per answer."""

    refs: SampleRefs
    per_answer: np.ndarray


@dataclass(frozen=True)
class Experience:
    """Scored rollouts."""

    rollouts: Rollouts
    reference: TokenColumn | None
    values: TokenColumn | None
    scores: np.ndarray
    """[samples] as they are trained on; nan: no score, so that nothing is learnt from the sample."""
    kl: KLTerm
    advantages: np.ndarray | None = None
    """[samples] per answer; None: workers estimate them per token."""
    ptx: list[np.ndarray] = field(default_factory=list)
    """Rows of demonstrations beside each mini-batch."""

    @property
    def scored(self) -> np.ndarray:
        """The samples that are trained on: those with a score."""
        return np.flatnonzero(~np.isnan(self.scores))


def kl_per_token(rollouts: Rollouts, reference: TokenColumn | None) -> np.ndarray:
    """[samples] each answer's KL to the reference, k1, in nats per token; nan where there is no reference."""
    if reference is None:
        return np.full(len(rollouts), np.nan)
    return np.asarray(reference.per_answer / rollouts.trained_tokens)
