"""Policy losses."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveFloat

from configs.schema.base import Settings

Aggregation = Literal["token_mean", "sequence_mean", "sequence_sum", "constant", "prompt_mean"]
"""Which mean over a mini-batch a loss is. See workers.rl.aggregation."""


class PolicyLossSettings(Settings):
    """What Troupe's own policy losses have in common."""

    aggregation: Aggregation = "token_mean"
    """Mean over a mini-batch. token_mean: over all tokens (DAPO). sequence_mean: over responses, of each response's mean over its
    tokens (GRPO). sequence_sum: over responses, of the sum over its tokens. constant: the sum over all tokens, divided by
    responses x rollout.max_new_tokens (Dr. GRPO). prompt_mean: over the draws of prompts, of the mean over the tokens of all
    responses to it."""


class PPOClipLoss(PolicyLossSettings):
    """Clipped surrogate (Schulman et al. 2017)."""

    kind: Literal["ppo_clip"] = "ppo_clip"
    clip_low: PositiveFloat = 0.2
    """The probability ratio is clipped below 1 - clip_low."""
    clip_high: PositiveFloat = 0.2
    """The probability ratio is clipped above 1 + clip_high."""


class ReinforceLoss(PolicyLossSettings):
    """Score-function estimator (Williams 1992), for one update in a step."""

    kind: Literal["reinforce"] = "reinforce"
