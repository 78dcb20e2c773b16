"""An advantage per token: every token of a response gets the response's whole reward."""

from typing import Literal

from troupe import Settings, TokenAdvantage, masked


class WholeReward(TokenAdvantage):
    class Config(Settings):
        kind: Literal["whole_reward"] = "whole_reward"
        factor: float = 1.0

    def __call__(self, rewards, values, mask, gamma, lam, groups, total=None):
        returns = masked(rewards, mask).sum(dim=1, keepdim=True) * mask
        return self.config.factor * returns, returns
