"""Group relative policy optimization (Shao et al. 2024)."""

from typing import Literal

from troupe import AnswerAdvantage, AnswerAdvantageSettings, group_mean, group_std


class GRPO(AnswerAdvantage):
    class Config(AnswerAdvantageSettings):
        kind: Literal["grpo"] = "grpo"
        epsilon: float = 1e-6

    def __call__(self, scores):
        centered = scores.rewards - group_mean(scores.rewards, scores.groups)
        return centered / (group_std(scores.rewards, scores.groups) + self.config.epsilon)
