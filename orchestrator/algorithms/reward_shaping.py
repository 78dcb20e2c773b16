"""Reward shaping: from the scores of the reward sources to the rewards that are trained on."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from configs.schema import PPOSettings

EPSILON = 1e-8
"""Added to the variance: whitened constant scores are 0."""


def shape_scores(
    scores: npt.NDArray[np.floating], has_eos: npt.NDArray[np.bool_], settings: PPOSettings
) -> npt.NDArray[np.float32]:
    """Shaped scores [B] of a step. scores: [B], of all its responses. has_eos: [B], whether a response ended by itself.

    Whiten, clip, then subtract the penalty for a missing end. The penalty comes last to keep the value of its setting:
    whitening would remove it if all responses lack their end, the clip would remove it if scores are low.
    """
    shaped = scores.astype(np.float64)
    if settings.whiten_rewards:
        shaped = (shaped - shaped.mean()) / np.sqrt(shaped.var() + EPSILON)
    if settings.reward_clip is not None:
        shaped = shaped.clip(-settings.reward_clip, settings.reward_clip)
    return (shaped - settings.missing_eos_penalty * ~has_eos).astype(np.float32)


def shape_scored(
    rewards: npt.NDArray[np.floating], has_eos: npt.NDArray[np.bool_], settings: PPOSettings
) -> npt.NDArray[np.float32]:
    """`shape_scores` of the responses with a score; nan for the others, which count in no mean."""
    scored = ~np.isnan(rewards)
    shaped = np.full(len(rewards), np.nan, np.float32)
    shaped[scored] = shape_scores(rewards[scored], has_eos[scored], settings)
    return shaped
