"""Confidence intervals and other statistics of evaluations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist, fmean, stdev
from typing import NamedTuple


class Interval(NamedTuple):
    """A mean and its 95% confidence interval."""

    mean: float
    low: float
    high: float


def mean_interval(values: Sequence[float]) -> Interval:
    """Mean of independent values and its 95% interval by Student's t; infinite for a single value.

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("mean_interval: no values")
    mean = fmean(values)
    if len(values) == 1:
        return Interval(mean, -math.inf, math.inf)
    half = _t_975(len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half)


def paired_interval(before: Sequence[float], after: Sequence[float]) -> Interval:
    """Mean of after - before and its 95% interval; before[i] and after[i] belong to the same prompt.

    Raises:
        ValueError: the lengths differ, or there are no values.
    """
    return mean_interval([b - a for a, b in zip(before, after, strict=True)])


def distinct_share(answers: Sequence[str]) -> float:
    """Distinct answers / answers, ignoring surrounding space: 1 if no two are equal, near 0 for a collapsed policy."""
    if not answers:
        raise ValueError("distinct_share: no responses")
    return len({answer.strip() for answer in answers}) / len(answers)


def _t_975(degrees: int) -> float:
    """0.975 quantile of Student's t (Abramowitz & Stegun 26.7.5, within 0.2% for 3 or more degrees of freedom)."""
    if degrees <= 2:
        return (12.7062, 4.3027)[degrees - 1]
    z = NormalDist().inv_cdf(0.975)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return sum(term / degrees**power for power, term in enumerate(terms))
