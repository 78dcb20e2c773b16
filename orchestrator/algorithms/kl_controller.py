"""KL penalty controllers, fixed and adaptive, and the penalty term of a step."""

from __future__ import annotations

import math
from typing import Protocol

from configs.schema import AdaptiveKL, FixedKL, KLSettings
from workers.data.step_inputs import KLTerm


class KLController(Protocol):
    """Sets the coefficient of the KL penalty for each step."""

    coefficient: float

    def update(self, kl: float, samples: int) -> None:
        """Adapt to a step. kl: its mean in nats per token. samples: of the step."""

    def state(self) -> dict[str, float]:
        """State for a checkpoint."""

    def load(self, state: dict[str, float]) -> None:
        """Restore the state of a checkpoint."""


class FixedController:
    """A constant coefficient, always that of the settings: checkpoints do not contain it."""

    def __init__(self, coefficient: float) -> None:
        self.coefficient = coefficient

    def update(self, kl: float, samples: int) -> None:
        pass

    def state(self) -> dict[str, float]:
        return {}

    def load(self, state: dict[str, float]) -> None:
        pass


class AdaptiveController:
    """Proportional control in log space towards a target KL (Ziegler et al. 2019, section 2.2)."""

    def __init__(self, coefficient: float, target: float, horizon: int) -> None:
        """target: nats per token. horizon: time constant of the coefficient, in samples."""
        self.coefficient = coefficient
        self.target = target
        self.horizon = horizon

    def update(self, kl: float, samples: int) -> None:
        if not math.isfinite(kl):
            raise ValueError(f"the KL to the reference is {kl}: the adaptive coefficient cannot be updated")
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        # A step of more samples than the horizon counts as one horizon: beyond 5 the factor could turn negative.
        self.coefficient *= 1 + error * min(samples / self.horizon, 1.0)

    def state(self) -> dict[str, float]:
        return {"coefficient": self.coefficient}

    def load(self, state: dict[str, float]) -> None:
        self.coefficient = state["coefficient"]


def make_controller(settings: FixedKL | AdaptiveKL) -> KLController:
    """The controller that `ppo.kl.controller` describes."""
    if isinstance(settings, FixedKL):
        return FixedController(settings.coefficient)
    return AdaptiveController(settings.coefficient, settings.target, settings.horizon)


def kl_term(settings: KLSettings, coefficient: float) -> KLTerm:
    """The penalty term of a step, in the reward or in the loss (`ppo.kl.apply_to`)."""
    if settings.apply_to == "reward":
        return KLTerm(settings.estimator, reward_coefficient=coefficient)
    return KLTerm(settings.estimator, loss_coefficient=coefficient)
