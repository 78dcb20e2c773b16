"""Losses of the three stages.

Every loss comes per token [B, T] (per pair [B] for the reward model), to be summed, never averaged. The trainer divides
by the count of the whole batch, over all micro-batches and ranks: so neither micro-batching nor sharding changes a
gradient. A mean taken per micro-batch would weigh the tokens of a small one more.

Tensors are padded [B, T] over response tokens with a bool mask; what stands outside the mask is never read and costs 0.
B is 0 where a rank has fewer rows than others and computes a micro-batch of padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from workers.rl.advantages import masked, mean_and_variance
from workers.rl.kl import kl_estimate
from workers.rl.registry import Registry


@dataclass(frozen=True)
class LossOutput:
    """A loss before it is summed."""

    loss: Tensor
    """[B, T], 0 outside the mask."""
    statistics: dict[str, Tensor]
    """Name -> [B, T], without gradient and 0 outside the mask: metrics to be averaged over the tokens of the batch."""


def masked_sum(x: Tensor, mask: Tensor) -> Tensor:
    """Sum of x [B, T] over the mask."""
    return masked(x, mask).sum()


# ---------------------------------------------------------------- policy


class PolicyLoss(Protocol):
    """log_probs, old_log_probs (when the answer was sampled), advantages, mask: [B, T].

    The statistic approx_kl, KL(old | new) in nats per token, is what `ppo.target_kl` looks at.
    """

    def __call__(
        self, log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor, clip_range: float
    ) -> LossOutput: ...


policy_losses: Registry[PolicyLoss] = Registry("ppo.policy_loss")


@policy_losses.register("ppo_clip")
def ppo_clip(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor, clip_range: float
) -> LossOutput:
    """Clipped surrogate (Schulman et al. 2017, eq. 7). clip_fraction: tokens from which the clip takes the gradient."""
    # Masked before exp: the gradient of a discarded inf or nan would be nan, not 0.
    log_ratio = masked(log_probs - old_log_probs, mask)
    advantages = masked(advantages, mask)
    ratio = log_ratio.exp()
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_range, 1 + clip_range)
    statistics = {"approx_kl": kl_estimate(-log_ratio.detach(), "k3"), "clip_fraction": (clipped > plain).float()}
    return LossOutput(torch.maximum(plain, clipped), statistics)


@policy_losses.register("reinforce")
def reinforce(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor, clip_range: float
) -> LossOutput:
    """Score-function estimator (Williams 1992). Right only on the present policy's samples: one update per step."""
    log_ratio = masked(log_probs - old_log_probs, mask).detach()
    loss = -masked(advantages, mask) * masked(log_probs, mask)
    return LossOutput(loss, {"approx_kl": kl_estimate(-log_ratio, "k3")})


# ---------------------------------------------------------------- value


class ValueLoss(Protocol):
    """values, old_values (when the answer was scored), returns, mask: [B, T]."""

    def __call__(
        self, values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip_range: float
    ) -> LossOutput: ...


value_losses: Registry[ValueLoss] = Registry("ppo.value_loss")


@value_losses.register("clipped")
def clipped(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip_range: float) -> LossOutput:
    """Half the larger squared error of the value and of the value kept within clip_range of the old one.

    From the code beside Schulman et al. 2017 (OpenAI Baselines, ppo2).
    """
    change, wanted = masked(values - old_values, mask), masked(returns - old_values, mask)
    plain = 0.5 * (change - wanted).square()
    kept = 0.5 * (change.clamp(-clip_range, clip_range) - wanted).square()
    return LossOutput(torch.maximum(plain, kept), {"clip_fraction": (kept > plain).float()})


@value_losses.register("mse")
def mse(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip_range: float) -> LossOutput:
    """Half the squared error."""
    return LossOutput(0.5 * masked(values - returns, mask).square(), {})


def explained_variance(returns: Tensor, residuals: Tensor) -> Tensor:
    """1 - Var(returns - values) / Var(returns): 1 for a perfect critic, 0 for a constant, nan if the returns are one.

    Both arguments are [count, sum, sum of squares] over all ranks, as `advantages.moments` gives them: the first of the
    returns, the second of returns - values.
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
