"""Advantages per answer: numpy on the driver, over whole groups. A group is the answers to one draw of a prompt.

The worker gives each trained token of an answer the answer's number. Advantages per token (gae, reinforce) are made in the
worker: workers.rl.advantages.TokenAdvantage.

Answers without a score are nan: they count in no mean, get no advantage and are not trained on. The others of their group are.
Mini-batches are cut afterwards, also through a group, which changes no advantage.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from configs.extensions import Component
from configs.schema import AnswerAdvantageSettings, PPOSettings


@dataclass(frozen=True)
class AnswerScores:
    """A step's answers as advantages are made of them. Arrays are [samples]."""

    rewards: np.ndarray
    """float64, as they are trained on; nan: no score."""
    groups: np.ndarray
    """Ids of the groups, from 0."""
    tokens: np.ndarray
    """Trained tokens."""
    sources: Mapping[str, np.ndarray]
    """By source of the reward, what it says, as it says it; nan: no score."""


class AnswerAdvantage(Component, owner=PPOSettings, setting="advantage"):
    """Gives each answer one number. Its Config is of AnswerAdvantageSettings."""

    def __call__(self, scores: AnswerScores) -> np.ndarray:
        """[samples]; nan where an answer has no score, a number elsewhere."""
        raise NotImplementedError


def answer_advantages(ppo: PPOSettings, scores: AnswerScores) -> np.ndarray | None:
    """Advantages [samples] of the scored answers, 0 for the others; None where they are estimated per token, in the worker.

    Raises ValueError where an answer has a score and its advantage is not finite.
    """
    if not isinstance(ppo.advantage, AnswerAdvantageSettings):
        return None
    unscored, advantages = np.isnan(scores.rewards), AnswerAdvantage.of(ppo.advantage)(scores)
    if wrong := np.count_nonzero(~(np.isfinite(advantages) | unscored)):
        raise ValueError(f"ppo.advantage: {ppo.advantage.kind} gave {wrong} answers with a score no finite advantage")
    return np.where(unscored, 0.0, advantages)


def group_mean(x: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """[samples] mean of x [samples] over the numbers of each answer's group; nan where the group has none.

    nan in x is no number. groups: [samples] ids from 0.
    """
    known = ~np.isnan(x)
    counts = np.bincount(groups, known)
    with np.errstate(invalid="ignore"):
        return (np.bincount(groups, np.where(known, x, 0.0)) / counts)[groups]


def group_std(x: np.ndarray, groups: np.ndarray, ddof: int = 1) -> np.ndarray:
    """[samples] deviation of x [samples] over the numbers of each answer's group; 0 where there are no more than ddof.

    ddof: 1: the unbiased one, 0: the biased one.
    """
    known = ~np.isnan(x)
    squares = np.square(np.where(known, x - group_mean(x, groups), 0.0))
    degrees = np.bincount(groups, known) - ddof
    return np.sqrt(np.bincount(groups, squares) / np.maximum(degrees, 1))[groups]
