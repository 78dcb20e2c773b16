"""Floating-point operations of PPO on one sample: 2 for each parameter and token of a pass; attention scores are left out.

Twice: as the original benchmark counted (Colossal-AI, `PerformanceEvaluator`), so that its numbers compare, and as the loop
computes. The original's generation has no key-value cache: token after token it runs all that stands before.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SampleFlops:
    """A sample of `prompt` tokens and an answer; `total` is the length of both.

    Attributes:
        actor, critic, reference, reward: parameters of each model.
        checkpointing: activations are computed once more in the backward pass.
        frozen_base: adapters are trained, so that no gradient of the weights is computed.
    """

    actor: int
    critic: int
    reference: int
    reward: int
    prompt: int
    total: int
    checkpointing: bool = False
    frozen_base: bool = False

    @property
    def answer(self) -> int:
        return self.total - self.prompt

    @property
    def generation_original(self) -> float:
        """2 N (I + S - 1) A / 2 with I the prompt, S the whole, A the answer: a pass of I, I + 1, ... S - 1 tokens."""
        return 2 * self.actor * (self.prompt + self.total - 1) * self.answer / 2

    @property
    def generation_cached(self) -> float:
        """Every token but the last goes through the model once."""
        return 2 * self.actor * (self.total - 1)

    @property
    def experience_original(self) -> float:
        """Generation, and a forward pass of all four models."""
        models = self.actor + self.critic + self.reference + self.reward
        return self.generation_original + 2 * self.total * models

    @property
    def experience_cached(self) -> float:
        """Generation, and a forward pass of three: the actor's log-probabilities come from the engine."""
        return self.generation_cached + 2 * self.total * (self.critic + self.reference + self.reward)

    @property
    def learning_original(self) -> float:
        """One epoch: forward 1, backward 2, and 1 more with gradient checkpointing, of actor and critic."""
        return 2 * self.total * (self.actor + self.critic) * (3 + self.checkpointing)

    @property
    def learning_cached(self) -> float:
        """The same; through a frozen base the backward pass is 1."""
        return 2 * self.total * (self.actor + self.critic) * (3 + self.checkpointing - self.frozen_base)
