"""From what the rewards say to what is trained on."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from configs.schema import PPOSettings

EPSILON = 1e-8
"""Added to the variance: scores that do not vary whiten to 0."""


def shape_scores(
    scores: npt.NDArray[np.floating], has_eos: npt.NDArray[np.bool_], settings: PPOSettings
) -> npt.NDArray[np.float32]:
    """The scores [B] of a whole step as they are trained on; has_eos [B] says which answers ended by themselves.

    Whitened, then clipped, then less the penalty for a missing end. The penalty comes last so that it is always worth
    what the setting says: whitening would take it back where all answers lack their end, the clip where scores are low.
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
    """`shape_scores` of the answers that have a score; nan for the others, which count in no mean."""
    scored = ~np.isnan(rewards)
    shaped = np.full(len(rewards), np.nan, np.float32)
    shaped[scored] = shape_scores(rewards[scored], has_eos[scored], settings)
    return shaped
