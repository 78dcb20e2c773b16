"""The KL penalty to the reference."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from configs.schema.base import Settings


class FixedKL(Settings):
    """A constant coefficient."""

    kind: Literal["fixed"] = "fixed"
    coefficient: NonNegativeFloat = 0.1
    """Weight of the per-token KL penalty."""


class AdaptiveKL(Settings):
    """Proportional controller of the coefficient (Ziegler et al. 2019)."""

    kind: Literal["adaptive"] = "adaptive"
    coefficient: PositiveFloat = 0.1
    """Initial value."""
    target: PositiveFloat = 0.1
    """Target KL in nats per token."""
    horizon: PositiveInt = 2000
    """Samples over which the coefficient adapts."""


class KLSettings(Settings):
    apply_to: Literal["reward", "loss"] = "reward"
    """reward: subtracted from each token's reward, so earlier tokens are penalized too. loss: added to the policy loss of each
    token, so short responses gain nothing; its weight is then relative to the advantages as trained on: whitened by
    default."""
    estimator: Literal["k1", "k2", "k3"] = "k1"
    """Per-token estimator of KL(actor | reference) (Schulman 2020). In the loss, k2 has the gradient of
    KL(actor | reference), k3 that of KL(reference | actor); k1's gradient has mean 0, so it is refused."""
    controller: Annotated[FixedKL | AdaptiveKL, Field(discriminator="kind")] = FixedKL()
    """Controller of the coefficient."""

    @model_validator(mode="after")
    def _pulls(self) -> Self:
        if self.apply_to == "loss" and self.estimator == "k1":
            raise ValueError("k1 in the loss has a gradient with mean 0, so it is no penalty. Use estimator=k2 or k3.")
        return self
