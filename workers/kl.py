"""KL divergence of the policy from the reference: estimates, and who sets the penalty's coefficient."""

from __future__ import annotations

import math
from typing import Literal, Protocol

import torch
from torch import Tensor

from configs.schema import AdaptiveKL, FixedKL

KLEstimator = Literal["k1", "k2", "k3"]


def kl_estimate(log_ratio: Tensor, kind: KLEstimator) -> Tensor:
    """Estimate of KL(p | q) in nats, element by element, from samples of p.

    log_ratio: log p - log q of the sampled token, any shape; for KL(actor | reference) log pi - log ref, [B, T].
    Schulman 2020, "Approximating KL divergence", http://joschu.net/blog/kl-approx.html.

    k1: log_ratio; unbiased, may be negative. k2: half its square; biased, low variance.
    k3: exp(-log_ratio) - 1 + log_ratio; unbiased and never negative.
    """
    if kind == "k1":
        return log_ratio
    if kind == "k2":
        return 0.5 * log_ratio.square()
    # expm1: near 0, exp(x) - 1 - x in float32 would leave nothing but rounding.
    return torch.expm1(-log_ratio) + log_ratio


class KLController(Protocol):
    """Chooses the coefficient of the KL penalty, step by step."""

    coefficient: float

    def update(self, kl: float, samples: int) -> None:
        """Take note of a step's mean KL in nats per token, measured on so many samples."""

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps."""

    def load(self, state: dict[str, float]) -> None:
        """Go on from a checkpoint."""


class FixedController:
    """The same coefficient throughout, whatever a checkpoint was made with."""

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
        """target: nats per token. horizon: samples over which the coefficient follows."""
        self.coefficient = coefficient
        self.target = target
        self.horizon = horizon

    def update(self, kl: float, samples: int) -> None:
        if not math.isfinite(kl):
            raise ValueError(f"the KL to the reference is {kl}: the adaptive coefficient cannot follow it")
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        # A step of more samples than the horizon counts as one horizon: beyond 5 the factor could turn negative.
        self.coefficient *= 1 + error * min(samples / self.horizon, 1.0)

    def state(self) -> dict[str, float]:
        return {"coefficient": self.coefficient}

    def load(self, state: dict[str, float]) -> None:
        self.coefficient = state["coefficient"]


def make_controller(settings: FixedKL | AdaptiveKL) -> KLController:
    """The controller that `ppo.kl.control` describes."""
    if isinstance(settings, FixedKL):
        return FixedController(settings.coefficient)
    return AdaptiveController(settings.coefficient, settings.target, settings.horizon)
