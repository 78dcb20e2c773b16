"""Losses of the three stages.

Every loss is per token [B, T] (per pair [B] for the reward model), and is summed, never averaged. The trainer divides by a count
of the whole batch, over all micro-batches and ranks, so micro-batches and sharding do not change a gradient. A mean per
micro-batch would give the tokens of small ones a larger weight (workers.rl.aggregation).

Tensors are padded [B, T] over response tokens with a bool mask; values outside the mask are never read, and their loss is 0.
B is 0 if a rank has fewer rows than others and computes a micro-batch of padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from configs.extensions import Component
from configs.schema import Aggregation, PPOClipLoss, PPOSettings, ReinforceLoss
from workers.rl.advantages import masked, mean_and_variance
from workers.rl.kl import kl_estimate
from workers.rl.registry import Registry


@dataclass(frozen=True)
class LossOutput:
    """A loss before it is summed."""

    loss: Tensor
    """[B, T], 0 outside the mask."""
    metrics: dict[str, Tensor]
    """Name -> [B, T], without gradient and 0 outside the mask; averaged over the tokens of the batch."""


def masked_sum(x: Tensor, mask: Tensor) -> Tensor:
    """Sum of x [B, T] over the mask."""
    return masked(x, mask).sum()


# ---------------------------------------------------------------- policy


@dataclass(frozen=True)
class LossInputs:
    """Inputs of a policy loss: tensors [B, T]."""

    log_probs: Tensor
    """From the trained policy."""
    behavior_log_probs: Tensor
    """From the engine, at sampling time."""
    proximal_log_probs: Tensor
    """From the policy in the denominator of the ratio; equal to the behavior's while all samples are on policy."""
    reference_log_probs: Tensor | None
    advantages: Tensor
    loss_mask: Tensor
    """bool"""

    @property
    def log_ratio(self) -> Tensor:
        """log(trained / proximal), 0 outside the mask. Masked before exp: otherwise unused inf or nan make gradients nan."""
        return masked(self.log_probs - self.proximal_log_probs, self.loss_mask)


class PolicyLoss(Component, owner=PPOSettings, setting="loss"):
    """A loss of the policy, and which mean over a mini-batch it is (workers.rl.aggregation)."""

    aggregation: Aggregation = "token_mean"
    """Settings that have an `aggregation` come before it."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.aggregation = getattr(config, "aggregation", self.aggregation)

    def __call__(self, inputs: LossInputs) -> LossOutput:
        raise NotImplementedError


class PPOClip(PolicyLoss):
    """Clipped surrogate (Schulman et al. 2017, eq. 7). clip_fraction: tokens from which the clip takes the gradient."""

    Config = PPOClipLoss
    config: PPOClipLoss

    def __call__(self, inputs: LossInputs) -> LossOutput:
        advantages, ratio = masked(inputs.advantages, inputs.loss_mask), inputs.log_ratio.exp()
        plain = -advantages * ratio
        clipped = -advantages * ratio.clamp(1 - self.config.clip_low, 1 + self.config.clip_high)
        return LossOutput(torch.maximum(plain, clipped), {"clip_fraction": (clipped > plain).float()})


class Reinforce(PolicyLoss):
    """Score-function estimator (Williams 1992). Correct only on the current policy's samples: one update per step."""

    Config = ReinforceLoss

    def __call__(self, inputs: LossInputs) -> LossOutput:
        mask = inputs.loss_mask
        return LossOutput(-masked(inputs.advantages, mask) * masked(inputs.log_probs, mask), {})


def kl_from_behavior(inputs: LossInputs) -> Tensor:
    """KL(behavior | trained) [B, T] in nats per token, without gradient; compared with `ppo.target_kl`."""
    log_ratio = masked(inputs.log_probs - inputs.behavior_log_probs, inputs.loss_mask)
    return kl_estimate(-log_ratio.detach(), "k3")


# ---------------------------------------------------------------- value


class ValueLoss(Protocol):
    """values, old_values (when the answer was scored), returns, mask: [B, T]."""

    def __call__(
        self, values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip_range: float
    ) -> LossOutput: ...


value_losses: Registry[ValueLoss] = Registry("ppo.value_loss")


@value_losses.register("clipped")
def clipped(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip_range: float) -> LossOutput:
    """Half the larger squared error of two: the value's, and that of the value clipped to within clip_range of the old one.

    From the code for Schulman et al. 2017 (OpenAI Baselines, ppo2).
    """
    change, target = masked(values - old_values, mask), masked(returns - old_values, mask)
    plain = 0.5 * (change - target).square()
    limited = 0.5 * (change.clamp(-clip_range, clip_range) - target).square()
    return LossOutput(torch.maximum(plain, limited), {"clip_fraction": (limited > plain).float()})


@value_losses.register("mse")
def mse(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip_range: float) -> LossOutput:
    """Half the squared error."""
    return LossOutput(0.5 * masked(values - returns, mask).square(), {})


def explained_variance(returns: Tensor, residuals: Tensor) -> Tensor:
    """1 - Var(returns - values) / Var(returns): 1 for a perfect critic, 0 for a constant one, nan if the returns are constant.

    Both arguments are [count, sum, sum of squares] over all ranks, from `advantages.moments`: of the returns, and of
    returns - values.
    """
    return 1 - mean_and_variance(residuals)[1] / mean_and_variance(returns)[1]


# ---------------------------------------------------------------- supervised


def next_token(log_probs: Tensor, mask: Tensor) -> Tensor:
    """Negative log-likelihood [B, T] of the tokens on the mask."""
    return masked(-log_probs, mask)


def pairwise(chosen: Tensor, rejected: Tensor, margin: Tensor, center: float) -> Tensor:
    """Logistic loss [B] of scores [B]: -log sigmoid(chosen - rejected - margin) + center * (chosen + rejected)**2.

    The margin is that of Touvron et al. 2023 (eq. 2), the centring term that of Eisenstein et al. 2023.
    """
    return -logsigmoid(chosen - rejected - margin) + center * (chosen + rejected).square()
