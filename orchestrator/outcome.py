"""What PPO changed on held-out prompts, as numbers."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from orchestrator.intervals import distinct_share, paired_interval
from orchestrator.metrics import read_lines

Line = dict[str, Any]


def outcome(folder: Path) -> dict[str, float]:
    """Numbers of a run's two evaluations, before.jsonl and after.jsonl; empty where they are not both there.

    For the reward and each judge (`judge/<name>`): the mean `_before` and `_after`, the `_change` and its 95% interval over
    prompts, `_change_low` and `_change_high`. `reward_gain` is the change in deviations of the rewards before.
    `kl`: nats per token of the answers after; `distinct`: share of distinct answers among them; `prompts`: how many.
    """
    paths = folder / "evaluation" / "before.jsonl", folder / "evaluation" / "after.jsonl"
    if not all(path.exists() for path in paths):
        return {}
    before, after = scored_pairs(*(read_lines(path) for path in paths))
    rewards = [line["reward"] for line in before]
    found = _change("reward", rewards, [line["reward"] for line in after])
    if len(rewards) > 1 and stdev(rewards) > 0:
        found["reward_gain"] = found["reward_change"] / stdev(rewards)
    for judge in before[0]["judges"]:
        found |= _change(f"judge/{judge}", *([line["judges"][judge] for line in lines] for lines in (before, after)))
    return found | {
        "kl": _kl(after),
        "distinct": distinct_share([line["answer"] for line in after]),
        "prompts": len(after),
    }


def scored_pairs(before: list[Line], after: list[Line]) -> tuple[list[Line], list[Line]]:
    """Of two evaluations those prompts whose answers all have a score by every source."""

    def scored(line: Line) -> bool:
        return None not in (line["reward"], *line["judges"].values())

    both = [(a, b) for a, b in zip(before, after, strict=True) if scored(a) and scored(b)]
    return [a for a, _ in both], [b for _, b in both]


def _change(name: str, before: list[float], after: list[float]) -> dict[str, float]:
    change = paired_interval(before, after)
    return {
        f"{name}_before": fmean(before),
        f"{name}_after": fmean(after),
        f"{name}_change": change.mean,
        f"{name}_change_low": change.low,
        f"{name}_change_high": change.high,
    }


def _kl(lines: list[dict[str, Any]]) -> float:
    """Summed over all answers / their tokens."""
    return sum(line["kl"] * line["tokens"] for line in lines) / sum(line["tokens"] for line in lines)
