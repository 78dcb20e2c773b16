"""From scores to advantages.

Per-token tensors are float32, padded [B, T] over trained tokens only: column t is a sample's t-th trained token. Tokens between
two trained tokens, such as an environment's reply, are left out, so discounting goes from one trained token to the next. The bool
mask [B, T] is True on real tokens and False on padding, which is on the right. Values outside the mask are never read (they may
be nan); outputs are 0 there.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from configs.extensions import Component
from configs.schema import GAEAdvantage, PPOSettings, ReinforceAdvantage

EPSILON = 1e-8
"""Added to variances, so that constants whiten to 0."""

AllReduceSum = Callable[[Tensor], Tensor]
"""Sums a tensor over the ranks that share a batch (an all-reduce), returning the sum."""


def no_reduce(x: Tensor) -> Tensor:
    """The sum over a single rank."""
    return x


class TokenAdvantage(Component, owner=PPOSettings, setting="advantage"):
    """Advantages and returns of every trained token. Those per answer are orchestrator.algorithms.credit.AnswerAdvantage.

    rewards [B, T] per token; values [B, T] of the critic, None where there is none; mask [B, T]; groups [B], long: the draws
    of prompts that the rows answer. Whatever reaches across rows goes through `total`, so that the number of ranks changes
    nothing. The rows are those of one rank: ranks may have unequally many, or none (B = 0), but all of them call `total`.
    Returns (advantages, returns), both [B, T] and 0 outside the mask.
    """

    def __call__(
        self,
        rewards: Tensor,
        values: Tensor | None,
        mask: Tensor,
        gamma: float,
        lam: float,
        groups: Tensor,
        total: AllReduceSum = no_reduce,
    ) -> tuple[Tensor, Tensor]:
        raise NotImplementedError


class GAE(TokenAdvantage):
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16). After an answer's last token the value is 0."""

    Config = GAEAdvantage

    def __call__(
        self,
        rewards: Tensor,
        values: Tensor | None,
        mask: Tensor,
        gamma: float,
        lam: float,
        groups: Tensor,
        total: AllReduceSum = no_reduce,
    ) -> tuple[Tensor, Tensor]:
        if values is None:
            raise ValueError("ppo.advantage: 'gae' needs the values of a critic")
        values = masked(values, mask)
        following = pad(values[:, 1:], (0, 1))
        advantages = discounted_suffix_sum(masked(rewards, mask) + gamma * following - values, gamma * lam)
        return advantages, advantages + values


class Reinforce(TokenAdvantage):
    """Discounted rewards to go, minus the batch mean of the answers' returns (Williams 1992).

    Ignores values and lam.
    """

    Config = ReinforceAdvantage

    def __call__(
        self,
        rewards: Tensor,
        values: Tensor | None,
        mask: Tensor,
        gamma: float,
        lam: float,
        groups: Tensor,
        total: AllReduceSum = no_reduce,
    ) -> tuple[Tensor, Tensor]:
        returns = discounted_suffix_sum(masked(rewards, mask), gamma)
        answered = mask.any(dim=1)
        return_sum, answers = total(torch.stack([returns[:, :1].double().sum(), answered.double().sum()]))
        baseline = return_sum / answers
        return masked(returns - baseline, mask), returns


def discounted_suffix_sum(x: Tensor, factor: float) -> Tensor:
    """y[:, t] = sum over k >= 0 of factor**k * x[:, t + k], for x [B, T].

    A doubling scan (Hillis & Steele 1986): after n of its log2(T) passes each column holds the sum of 2**n terms.
    """
    shift = 1
    while shift < x.shape[1]:
        x = x + factor**shift * pad(x[:, shift:], (0, shift))
        shift *= 2
    return x


def masked(x: Tensor, mask: Tensor) -> Tensor:
    """x [B, T] with 0 outside the mask."""
    return torch.where(mask, x, 0.0)


# ---------------------------------------------------------------- whitening


def moments(x: Tensor, mask: Tensor) -> Tensor:
    """[count, sum, sum of squares] of x inside the mask: one float64 tensor, which ranks add up in one all-reduce."""
    x = masked(x, mask).double()
    return torch.stack([mask.sum().double(), x.sum(), x.square().sum()])


def mean_and_variance(sums: Tensor) -> tuple[Tensor, Tensor]:
    """Population mean and variance from the sums that `moments` returns."""
    count, total, squares = sums
    mean = total / count
    return mean, (squares / count - mean.square()).clamp(min=0.0)


def whiten(x: Tensor, mask: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    """(x [B, T] - mean) / sqrt(var). With the moments over all ranks, every rank applies the same scale."""
    return masked((x - mean) * (var + EPSILON).rsqrt(), mask)


# ---------------------------------------------------------------- rewards


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, kl_coefficient: float) -> Tensor:
    """Reward of each token [B, T]: -kl_coefficient * kl [B, T], plus, on a sample's last trained token, its score [B]."""
    last = mask & ~pad(mask[:, 1:], (0, 1))
    return masked(-kl_coefficient * kl, mask) + masked(scores[:, None], last)
