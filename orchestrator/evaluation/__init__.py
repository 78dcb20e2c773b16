"""Evaluations on held-out prompts, sampled answers, and their statistics. `orchestrator.evaluate` runs one."""

from typing import TYPE_CHECKING

from troupe.imports import lazy

if TYPE_CHECKING:
    from orchestrator.evaluation.before_after import before_after_numbers, mean_kl, scored_pairs
    from orchestrator.evaluation.evaluate import Evaluation, record_faults, weighted_sum
    from orchestrator.evaluation.sample_log import keep_samples, last_samples
    from orchestrator.evaluation.statistics import Interval, distinct_share, mean_interval, paired_interval

__all__ = [
    "Evaluation",
    "Interval",
    "before_after_numbers",
    "distinct_share",
    "keep_samples",
    "last_samples",
    "mean_interval",
    "mean_kl",
    "paired_interval",
    "record_faults",
    "scored_pairs",
    "weighted_sum",
]

__getattr__ = lazy(
    __name__,
    {
        "orchestrator.evaluation.before_after": ("before_after_numbers", "mean_kl", "scored_pairs"),
        "orchestrator.evaluation.evaluate": ("Evaluation", "record_faults", "weighted_sum"),
        "orchestrator.evaluation.sample_log": ("keep_samples", "last_samples"),
        "orchestrator.evaluation.statistics": ("Interval", "distinct_share", "mean_interval", "paired_interval"),
    },
)
