"""Advantages per response: numpy on the driver, over whole groups. A group is the responses to one draw of a prompt.

The worker gives each trained token the advantage of its response. Advantages per token (gae, reinforce) are computed in the
worker: workers.rl.advantages.TokenAdvantage.

A response without a score is nan: it counts in no mean, has no advantage and is not trained on; the others of its group are.
Mini-batches are cut afterwards. They may divide a group, which changes no advantage.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from configs.extensions import Component
from configs.schema import AnswerAdvantageSettings, PPOSettings


@dataclass(frozen=True)
class AnswerScores:
    """A step's scores, from which advantages are computed. Arrays are [samples]."""

    rewards: np.ndarray
    """float64, after reward shaping; nan: no score."""
    groups: np.ndarray
    """Ids of the groups, from 0."""
    tokens: np.ndarray
    """Trained tokens."""
    sources: Mapping[str, np.ndarray]
    """Reward source -> its unchanged scores; nan: no score."""


class AnswerAdvantage(Component, owner=PPOSettings, setting="advantage"):
    """Gives each response one advantage. Its Config is a subclass of AnswerAdvantageSettings."""

    def __call__(self, scores: AnswerScores) -> np.ndarray:
        """[samples]; nan for a response without a score, finite for the others."""
        raise NotImplementedError


def answer_advantages(ppo: PPOSettings, scores: AnswerScores) -> np.ndarray | None:
    """Advantages [samples] of the scored responses, 0 for the others. None: workers estimate advantages per token.

    Raises ValueError if a response has a score and no finite advantage.
    """
    if not isinstance(ppo.advantage, AnswerAdvantageSettings):
        return None
    unscored, advantages = np.isnan(scores.rewards), AnswerAdvantage.of(ppo.advantage)(scores)
    if wrong := np.count_nonzero(~(np.isfinite(advantages) | unscored)):
        raise ValueError(
            f"ppo.advantage: {ppo.advantage.kind} gave no finite advantage for {wrong} responses with a score"
        )
    return np.where(unscored, 0.0, advantages)


def group_mean(x: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """[samples] mean of x [samples] over each response's group, without nan; nan if the whole group is nan.

    groups: [samples] ids from 0.
    """
    scored = ~np.isnan(x)
    counts = np.bincount(groups, scored)
    with np.errstate(invalid="ignore"):
        return (np.bincount(groups, np.where(scored, x, 0.0)) / counts)[groups]


def group_std(x: np.ndarray, groups: np.ndarray, ddof: int = 1) -> np.ndarray:
    """[samples] standard deviation of x [samples] over each response's group, without nan; 0 for a group of ddof or fewer.

    ddof: 1 for the unbiased estimator, 0 for the biased one.
    """
    scored = ~np.isnan(x)
    squares = np.square(np.where(scored, x - group_mean(x, groups), 0.0))
    degrees = np.bincount(groups, scored) - ddof
    return np.sqrt(np.bincount(groups, squares) / np.maximum(degrees, 1))[groups]
