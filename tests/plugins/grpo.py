"""Group relative policy optimization (Shao et al. 2024), as a plugin."""

from typing import Literal

import numpy as np

from configs.schema import AnswerAdvantageSettings
from orchestrator.algorithms.credit import AnswerAdvantage, AnswerScores, group_mean, group_std


class GRPO(AnswerAdvantage):
    class Config(AnswerAdvantageSettings):
        kind: Literal["grpo"] = "grpo"
        epsilon: float = 1e-6

    config: Config

    def __call__(self, scores: AnswerScores) -> np.ndarray:
        rewards, groups = scores.rewards, scores.groups
        return (rewards - group_mean(rewards, groups)) / (group_std(rewards, groups) + self.config.epsilon)
