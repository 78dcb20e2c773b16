"""A stage's progress in the terminal: a live line where there is a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress
from rich.text import Text

PLAIN_INTERVAL = 2.0
"""Least seconds between two plain step lines."""

_HEADLINES: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("reward/mean", "reward", lambda value: f"{value:+.3f}"),
    ("kl", "KL", lambda value: f"{value:.3f}"),
    ("loss", "loss", lambda value: f"{value:.3f}"),
    ("accuracy", "accuracy", lambda value: f"{value:.1%}"),
    ("validation/loss", "val. loss", lambda value: f"{value:.3f}"),
    ("validation/accuracy", "val. accuracy", lambda value: f"{value:.1%}"),
    ("tokens_per_second", "tokens/s", lambda value: f"{value:,.0f}"),
)
"""(metric, label, format) of what is shown beside the step, where the stage has it."""


class Progress:
    """Shows a stage's steps, time left and headline numbers until the `with` block ends, by Ctrl-C too.

    Args:
        stage: Name of the stage.
        steps: Step at which the stage ends.
        console: Where to; none: standard output.
        start: Step after which the stage goes on, when it was resumed.
    """

    def __init__(self, stage: str, steps: int, console: Console | None = None, start: int = 0) -> None:
        self._stage, self._steps = stage, steps
        self._console = console or Console()
        self._latest: dict[str, float] = {}
        self._first: tuple[int, float] | None = None  # Step and time of the first update: start-up is not in the ETA.
        self._printed_at: float | None = None
        self._pending: str | None = None
        self._bar = RichProgress(
            SpinnerColumn(finished_text="[green]✓[/green]"),
            TextColumn("[bold]{task.fields[stage]}[/bold]", markup=True),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[detail]}", markup=False),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("", total=steps, completed=start, stage=stage, detail="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._bar.update(self._task, detail=" · ".join(self._numbers()))
        self._bar.stop()
        if self._pending is not None:
            self._print(self._pending)
            self._pending = None

    def phase(self, name: str) -> None:
        """Say what is going on, e.g. "starting workers"; the next phase or step takes its place."""
        if self._console.is_terminal:
            self._bar.update(self._task, detail=name)
        else:
            self._print(f"{self._stage}: {name}")

    def note(self, text: str) -> None:
        """Print a line of its own, above the live line."""
        self._print(text)

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show that `step` is done. Numbers that `metrics` lacks keep their last value."""
        now = time.monotonic()
        self._latest.update(metrics)
        left = self._time_left(step, now)
        detail = " · ".join([*([f"{left} left"] if left else []), *self._numbers()])
        if self._console.is_terminal:
            self._bar.update(self._task, completed=step, detail=detail)
            return
        line = " · ".join(filter(None, [f"{self._stage} {step}/{self._steps}", detail]))
        if self._printed_at is None or step >= self._steps or now - self._printed_at >= PLAIN_INTERVAL:
            self._printed_at, self._pending = now, None
            self._print(line)
        else:
            self._pending = line

    def _numbers(self) -> list[str]:
        return [f"{label} {show(self._latest[name])}" for name, label, show in _HEADLINES if name in self._latest]

    def _time_left(self, step: int, now: float) -> str:
        """h:mm:ss or m:ss by the mean time per step since the first; empty where nothing is known, and at the end."""
        if self._first is None:
            self._first = step, now
        first_step, first_time = self._first
        if step <= first_step or step >= self._steps:
            return ""
        return clock((now - first_time) / (step - first_step) * (self._steps - step))

    def _print(self, text: str) -> None:
        self._console.print(Text(text), soft_wrap=True)


def clock(seconds: float) -> str:
    """h:mm:ss, or m:ss below an hour.

    >>> clock(59.6), clock(3723)
    ('1:00', '1:02:03')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
