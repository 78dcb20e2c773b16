"""Floating-point operations of PPO on one sample: 2 for each parameter and token of a pass, without attention scores.

Counted in two ways: as the original benchmark did (Colossal-AI, `PerformanceEvaluator`), so that the numbers can be compared, and
as this loop computes. The original generates without a key-value cache: for each token it runs the whole sequence so far.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SampleFlops:
    """A sample: a prompt of `prompt` tokens and its response; `total` is the length of both.

    Attributes:
        actor, critic, reference, reward: parameters of each model.
        checkpointing: activations are recomputed in the backward pass.
        frozen_base: only adapters are trained, so no gradients of the base's weights are computed.
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
    def response(self) -> int:
        return self.total - self.prompt

    @property
    def generation_original(self) -> float:
        """2 N (I + S - 1) A / 2 with I the prompt, S the total, A the response: passes of I, I + 1, ... S - 1 tokens."""
        return 2 * self.actor * (self.prompt + self.total - 1) * self.response / 2

    @property
    def generation_cached(self) -> float:
        """Every token except the last goes through the model once."""
        return 2 * self.actor * (self.total - 1)

    @property
    def experience_original(self) -> float:
        """Generation, and a forward pass of all four models."""
        models = self.actor + self.critic + self.reference + self.reward
        return self.generation_original + 2 * self.total * models

    @property
    def experience_cached(self) -> float:
        """Generation, and a forward pass of three models: the actor's log-probabilities come from the engine."""
        return self.generation_cached + 2 * self.total * (self.critic + self.reference + self.reward)

    @property
    def learning_original(self) -> float:
        """One epoch: forward 1, backward 2, and 1 more with gradient checkpointing, of actor and critic."""
        return 2 * self.total * (self.actor + self.critic) * (3 + self.checkpointing)

    @property
    def learning_cached(self) -> float:
        """The same, but with a frozen base the backward pass counts 1."""
        return 2 * self.total * (self.actor + self.critic) * (3 + self.checkpointing - self.frozen_base)
