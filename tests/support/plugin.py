"""A custom advantage per token, as a module for `plugins`."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from configs.schema import ReinforceAdvantage, Settings
from workers.rl.advantages import Reinforce, TokenAdvantage


class Scaled(TokenAdvantage):
    """Those of reinforce, times a factor."""

    class Config(Settings):
        kind: Literal["tests_scaled"] = "tests_scaled"
        factor: float = 0.5

    config: Config

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        advantages, returns = Reinforce(ReinforceAdvantage())(*args, **kwargs)
        return self.config.factor * advantages, returns
