"""What a finished run says in the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.text import Text

from orchestrator.api import Result
from orchestrator.progress import clock

TITLES = {"sft": "SFT", "rm": "reward model", "ppo": "PPO"}


def print_result(result: Result, console: Console) -> None:
    """What each stage achieved, in words; where the report and the models are, and how to talk to the last one."""
    folder = _shown(result.folder)
    rows = [("", f"{result.folder.name} is finished")]
    for stage in result.models:
        numbers = result.numbers.get(stage, {})
        first, *more = _WORDS[stage](numbers)
        took = f"{numbers['steps']:,.0f} steps in {clock(numbers['seconds'])}" if "seconds" in numbers else ""
        rows += [(TITLES[stage], " · ".join(filter(None, [first, took]))), *(("", line) for line in more)]
    rows.append(("report", _shown(result.report)))
    if models := [model for stage, model in result.models.items() if stage != "rm"]:
        rows += [("model", _shown(models[-1])), ("talk to it", f"troupe chat {folder}")]
    width = max(len(title) for title, _ in rows) + 2
    console.print()
    for title, text in rows:
        line = Text.assemble((title.ljust(width), "bold"), text) if title or text[:1] == " " else Text(text)
        console.print(line, soft_wrap=True)


def _sft(numbers: Mapping[str, float]) -> list[str]:
    perplexity = numbers.get("validation/perplexity")
    return [f"perplexity {perplexity:,.1f} on held-out demonstrations" if perplexity else "trained"]


def _rm(numbers: Mapping[str, float]) -> list[str]:
    accuracy = numbers.get("validation/accuracy")
    return [f"{accuracy:.1%} of held-out pairs ranked right" if accuracy is not None else "trained"]


def _ppo(numbers: Mapping[str, float]) -> list[str]:
    if "prompts" not in numbers:
        return ["trained; no held-out prompts to compare on (ppo.evaluation)"]
    lines = [f"{numbers['prompts']:,.0f} held-out prompts, before -> after: change [95% interval]"]
    gain = f", {numbers['reward_gain']:+.2f} standard deviations" if "reward_gain" in numbers else ""
    if "reward_change" in numbers:
        lines.append(f"  reward {_change(numbers, 'reward')}{gain}")
    judges = [
        name.removesuffix("_change") for name in numbers if name.startswith("judge/") and name.endswith("_change")
    ]
    lines += [f"  judge {judge.removeprefix('judge/')} {_change(numbers, judge)}" for judge in judges]
    if "kl" in numbers:
        lines.append(
            f"  KL to the reference {numbers['kl']:.3f} nats per token; {numbers['distinct']:.0%} of the answers are distinct"
        )
    return lines


_WORDS = {"sft": _sft, "rm": _rm, "ppo": _ppo}


def _change(numbers: Mapping[str, float], name: str) -> str:
    before, after, change, low, high = (
        numbers[f"{name}_{part}"] for part in ("before", "after", "change", "change_low", "change_high")
    )
    return f"{before:+.3f} -> {after:+.3f}: {change:+.3f} [{low:+.3f}, {high:+.3f}]"


def _shown(path: Path) -> str:
    """A path as one would type it: relative where it lies below the working folder."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
