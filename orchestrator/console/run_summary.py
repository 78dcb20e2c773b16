"""What a finished run says in the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from orchestrator.number_text import clock, percent
from orchestrator.run.result import Result
from placement.stages import STAGES


def print_result(result: Result, console: Console) -> None:
    """What each stage achieved, in words; where the report and the models are, and how to look into the run and talk to the
    last model."""
    folder = shown(result.folder)
    rows = [("", f"{result.folder.name} is finished"), *achieved(result), ("report", shown(result.report))]
    rows.append(("curves", f"tensorboard --logdir {folder}/tensorboard"))
    if models := [model for stage, model in result.models.items() if STAGES[stage].chats]:
        rows += [("model", shown(models[-1])), ("talk to it", f"troupe chat {folder}")]
    console.print()
    print_rows(rows, console)


def achieved(result: Result) -> list[tuple[str, str]]:
    """(title, text) lines of what each finished stage achieved, and how long it took; a line without a title goes on with the
    one before."""
    rows = []
    for stage in result.models:
        numbers = result.numbers.get(stage, {})
        first, *more = _WORDS.get(stage, _other)(numbers)
        took = f"{numbers['steps']:,.0f} steps" if "steps" in numbers else ""
        took += f" in {clock(result.seconds[stage])}" if took and stage in result.seconds else ""
        rows += [(STAGES[stage].short_title, " · ".join(filter(None, [first, took]))), *(("", line) for line in more)]
    return rows


def print_rows(rows: Sequence[tuple[str, str]], console: Console) -> None:
    """Print titles and texts side by side."""
    width = max(len(title) for title, _ in rows) + 2
    for title, text in rows:
        line = Text.assemble((title.ljust(width), "bold"), text) if title or text[:1] == " " else Text(text)
        console.print(line, soft_wrap=True)


def _sft(numbers: Mapping[str, float]) -> list[str]:
    perplexity = numbers.get("validation/perplexity")
    return ["trained" if perplexity is None else f"perplexity {perplexity:,.1f} on held-out demonstrations"]


def _rm(numbers: Mapping[str, float]) -> list[str]:
    accuracy = numbers.get("validation/accuracy")
    return [f"{percent(accuracy)} of held-out pairs ranked right" if accuracy is not None else "trained"]


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
        distinct = percent(numbers["distinct"])
        lines.append(
            f"  KL to the reference {numbers['kl']:z.3f} nats per token; {distinct} of the answers are distinct"
        )
    return lines


def _other(numbers: Mapping[str, float]) -> list[str]:
    """Of a stage that a plugin brings: the numbers of its validation."""
    shown = [f"{name} {value:.4g}" for name, value in numbers.items() if name.startswith("validation/")]
    return [", ".join(shown) or "trained"]


_WORDS = {"sft": _sft, "rm": _rm, "ppo": _ppo}


def _change(numbers: Mapping[str, float], name: str) -> str:
    before, after, change, low, high = (
        numbers[f"{name}_{part}"] for part in ("before", "after", "change", "change_low", "change_high")
    )
    return f"{before:+z.3f} -> {after:+z.3f}: {change:+z.3f} [{low:+z.3f}, {high:+z.3f}]"


def shown(path: Path) -> str:
    """A path as one would type it: relative where it lies below the working folder."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
