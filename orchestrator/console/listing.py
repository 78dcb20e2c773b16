"""What `troupe list` prints: the runs in a folder."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from configs import ConfigError
from orchestrator.number_text import age, percent
from orchestrator.run import Condition, Result, Run, RunError

WIDTHS = {"run": 20, "stage": 5, "step": 11, "state": 9, "result": 25, "age": 6}
"""Column -> maximum width; the sum is 80 characters, with the gaps."""


@dataclass(frozen=True)
class Entry:
    """A row of the table."""

    name: str
    stage: str
    step: str
    state: str
    result: str
    changed: float
    """Seconds since the epoch."""


def list_runs(folder: Path) -> list[Entry]:
    """The runs in a folder, the last changed first; other folders are skipped. Raises RunError if the folder does not exist."""
    if not folder.is_dir():
        raise RunError(f"{folder}: the folder does not exist")
    runs = [path for path in folder.iterdir() if (path / "config.yaml").is_file()]
    return sorted((_entry(path) for path in runs), key=lambda entry: -entry.changed)


def _entry(folder: Path) -> Entry:
    files = [path for name in ("status.json", "run.json", "config.yaml") if (path := folder / name).exists()]
    changed = max(path.stat().st_mtime for path in files)
    try:
        run = Run.open(folder)
        condition, result = Condition.of(run), Result.of(run)
    except (ConfigError, RunError, ValueError) as error:  # one damaged or old run must not hide the others
        return Entry(folder.name, "", "", "invalid", str(error).partition("\n")[0], changed)
    now = condition.now
    step = f"{now['step']:,}/{now['steps']:,}" if now else ""
    return Entry(folder.name, now.get("stage", ""), step, condition.state, _headline(result), changed)


def _headline(result: Result) -> str:
    """The main numbers of the last finished stage."""
    for stage in reversed(list(result.models)):
        if parts := _parts(stage, result.numbers.get(stage, {})):
            return " ".join(parts)
    return ""


def _parts(stage: str, numbers: Mapping[str, float]) -> Sequence[str]:
    if stage == "ppo" and "reward_change" in numbers:
        kl = [f"KL {numbers['kl']:z.3f}"] if "kl" in numbers else []
        return [f"reward {numbers['reward_change']:+z.3f}", *kl]
    if stage == "rm" and "validation/accuracy" in numbers:
        return [f"accuracy {percent(numbers['validation/accuracy'])}"]
    if stage == "sft" and "validation/perplexity" in numbers:
        return [f"perplexity {numbers['validation/perplexity']:,.1f}"]
    return []


def print_runs(folder: Path, console: Console) -> None:
    """Print a table of the runs in a folder. Errors: see list_runs."""
    entries = list_runs(folder)
    if not entries:
        console.print(Text(f"no runs in {folder}"), soft_wrap=True)
        return
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for name, width in WIDTHS.items():
        table.add_column(
            name,
            no_wrap=True,
            overflow="ellipsis",
            max_width=width,
            justify="right" if name in ("step", "age") else "left",
        )
    now = time.time()
    for entry in entries:
        cells = (entry.name, entry.stage, entry.step, entry.state, entry.result, age(now - entry.changed))
        table.add_row(*map(Text, cells))
    console.print(table)
