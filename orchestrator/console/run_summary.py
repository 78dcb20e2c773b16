"""The lines that a finished run prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from orchestrator.number_text import clock, percent
from orchestrator.run import Result
from placement.stages import STAGES


def print_result(result: Result, console: Console) -> None:
    """Print each stage's results, the paths of the report and the last model, and the commands for the curves and for a chat."""
    folder = display_path(result.folder)
    rows = [("", f"{result.folder.name} is finished"), *stage_results(result), ("report", display_path(result.report))]
    if (result.folder / "tensorboard").exists():
        rows.append(("curves", f"tensorboard --logdir {folder}/tensorboard"))
    if models := [model for stage, model in result.models.items() if STAGES[stage].chats]:
        rows += [("model", display_path(models[-1])), ("chat", f"troupe chat {folder}")]
    console.print()
    print_rows(rows, console)


def stage_results(result: Result) -> list[tuple[str, str]]:
    """(title, text) lines with each finished stage's results and duration; a line without a title continues the one before."""
    rows = []
    for stage in result.models:
        numbers = result.numbers.get(stage, {})
        first, *more = _FORMATS.get(stage, _other)(numbers)
        duration = f"{numbers['steps']:,.0f} steps" if "steps" in numbers else ""
        duration += f" in {clock(result.seconds[stage])}" if duration and stage in result.seconds else ""
        rows += [
            (STAGES[stage].short_title, " · ".join(filter(None, [first, duration]))),
            *(("", line) for line in more),
        ]
    return rows


def print_rows(rows: Sequence[tuple[str, str]], console: Console) -> None:
    """Print titles and texts in two columns."""
    width = max(len(title) for title, _ in rows) + 2
    for title, text in rows:
        line = Text.assemble((title.ljust(width), "bold"), text) if title or text[:1] == " " else Text(text)
        console.print(line, soft_wrap=True)


def _sft(numbers: Mapping[str, float]) -> list[str]:
    perplexity = numbers.get("validation/perplexity")
    return ["trained" if perplexity is None else f"perplexity {perplexity:,.1f} on held-out demonstrations"]


def _rm(numbers: Mapping[str, float]) -> list[str]:
    accuracy = numbers.get("validation/accuracy")
    return [f"preference accuracy {percent(accuracy)} on held-out pairs" if accuracy is not None else "trained"]


def _ppo(numbers: Mapping[str, float]) -> list[str]:
    if "prompts" not in numbers:
        return ["trained; no held-out prompts (ppo.evaluation)"]
    lines = [f"{numbers['prompts']:,.0f} held-out prompts, before -> after: change [95% interval]"]
    gain = f", gain {numbers['reward_gain']:+.2f} std" if "reward_gain" in numbers else ""
    if "reward_change" in numbers:
        lines.append(f"  reward {_change(numbers, 'reward')}{gain}")
    judges = [
        name.removesuffix("_change") for name in numbers if name.startswith("judge/") and name.endswith("_change")
    ]
    lines += [f"  judge {judge.removeprefix('judge/')} {_change(numbers, judge)}" for judge in judges]
    if "distinct" in numbers:
        kl = f"KL to the reference {numbers['kl']:z.3f} nats per token; " if "kl" in numbers else ""
        lines.append(f"  {kl}{percent(numbers['distinct'])} distinct responses")
    return lines


def _other(numbers: Mapping[str, float]) -> list[str]:
    """The validation metrics, of a stage from a plugin."""
    metrics = [f"{name} {value:.4g}" for name, value in numbers.items() if name.startswith("validation/")]
    return [", ".join(metrics) or "trained"]


_FORMATS = {"sft": _sft, "rm": _rm, "ppo": _ppo}


def _change(numbers: Mapping[str, float], name: str) -> str:
    before, after, change, low, high = (
        numbers[f"{name}_{part}"] for part in ("before", "after", "change", "change_low", "change_high")
    )
    return f"{before:+z.3f} -> {after:+z.3f}: {change:+z.3f} [{low:+z.3f}, {high:+z.3f}]"


def display_path(path: Path) -> str:
    """A path as a user would type it: relative if it is below the working folder."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
