"""Numbers before and after PPO on held-out prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from orchestrator.evaluation.statistics import distinct_share, paired_interval
from orchestrator.storage import read_lines

Line = Mapping[str, Any]


def before_after_numbers(folder: Path) -> dict[str, float]:
    """Numbers of a run's two evaluations, before.jsonl and after.jsonl; empty if one is missing.

    For the reward and each judge (`judge/<name>`), over the prompts with scores for both answers: the means `_before` and
    `_after`, the `_change` and its 95% interval over prompts, `_change_low` and `_change_high`, and the number of such prompts,
    `_pairs`; omitted if there are none. `reward_gain`: the change in standard deviations of the rewards before.
    `kl`: nats per token of the answers after, omitted if there is no reference;
    `distinct`: share of distinct answers after; `prompts`: their number.
    """
    paths = folder / "evaluation" / "before.jsonl", folder / "evaluation" / "after.jsonl"
    if not all(path.exists() for path in paths):
        return {}
    before, after = (read_lines(path) for path in paths)
    rewards = scored_pairs(before, after)
    numbers = _change("reward", *rewards)
    if len(rewards[0]) > 1 and stdev(rewards[0]) > 0:
        numbers["reward_gain"] = numbers["reward_change"] / stdev(rewards[0])
    for judge in after[0]["judges"] if after else ():
        numbers |= _change(f"judge/{judge}", *scored_pairs(before, after, judge))
    if after:
        numbers["distinct"] = distinct_share([line["answer"] for line in after])
        if (kl := mean_kl(after)) is not None:
            numbers["kl"] = kl
    return numbers | {"prompts": len(after)}


def scored_pairs(
    before: Sequence[Line], after: Sequence[Line], judge: str | None = None
) -> tuple[list[float], list[float]]:
    """A judge's scores (None: the rewards) before and after, of the prompts with a score for both answers."""

    def score(line: Line) -> float | None:
        return line["reward"] if judge is None else line["judges"].get(judge)

    pairs = [(score(a), score(b)) for a, b in zip(before, after, strict=True)]
    both = [(a, b) for a, b in pairs if a is not None and b is not None]
    return [a for a, _ in both], [b for _, b in both]


def _change(name: str, before: list[float], after: list[float]) -> dict[str, float]:
    if not before:
        return {}
    change = paired_interval(before, after)
    return {
        f"{name}_before": fmean(before),
        f"{name}_after": fmean(after),
        f"{name}_change": change.mean,
        f"{name}_change_low": change.low,
        f"{name}_change_high": change.high,
        f"{name}_pairs": len(before),
    }


def mean_kl(lines: Sequence[Line]) -> float | None:
    """KL to the reference per token over all answers, in nats; None if there is no reference."""
    if any(line["kl"] is None for line in lines):
        return None
    return float(sum(line["kl"] * line["tokens"] for line in lines) / max(1, sum(line["tokens"] for line in lines)))
