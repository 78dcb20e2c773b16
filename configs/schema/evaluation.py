"""Evaluations on held-out prompts."""

from __future__ import annotations

from pydantic import PositiveInt

from configs.schema.base import Settings
from configs.schema.data import DatasetSettings
from configs.schema.rewards import Judge


class EvaluationSettings(Settings):
    """Responses to held-out prompts, before and after training."""

    prompts: DatasetSettings
    """Held-out prompts."""
    every: PositiveInt | None = None
    """Steps between evaluations; none: only before the first step and after the last."""
    samples: PositiveInt = 16
    """Prompts that the report shows with their responses."""
    judges: list[Judge] = []
    """Independent judges."""


EVALUATION_METRICS = ("reward", "reward_ci_low", "reward_ci_high", "reward_std", "kl", "length", "distinct", "unscored")
"""Last parts of the metrics `evaluation/...`; no judge may have such a name."""
