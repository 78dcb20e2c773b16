"""A stage's progress in the terminal: a live line where there is a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Self

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from orchestrator.number_text import clock, percent

PLAIN_INTERVAL = 2.0
"""Minimum seconds between two plain step lines."""

_HEADLINES: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("reward/mean", "reward", lambda value: f"{value:+z.3f}"),
    ("kl", "KL", lambda value: f"{value:z.3f}"),
    ("loss", "loss", lambda value: f"{value:.3f}"),
    ("accuracy", "accuracy", percent),
    ("validation/loss", "val. loss", lambda value: f"{value:.3f}"),
    ("validation/accuracy", "val. accuracy", percent),
    ("tokens_per_second", "tokens/s", lambda value: f"{value:,.0f}"),
)
"""(metric, label, format) of the numbers shown beside the step, if the stage has them."""


BAR, BAR_FROM = 24, 90
"""Width of the bar, and minimum width of a terminal that shows it, in characters."""


class Progress:
    """Shows a stage's steps, time left and headline numbers until the `with` block ends, by Ctrl-C too.

    Args:
        stage: Name of the stage.
        steps: Step at which the stage ends.
        console: Where to; none: standard output.
        start: Last finished step of a resumed stage.
        on_phase: Called with each phase's name.
    """

    def __init__(
        self,
        stage: str,
        steps: int,
        console: Console | None = None,
        start: int = 0,
        on_phase: Callable[[str], None] = lambda name: None,
    ) -> None:
        self._stage, self._steps = stage, steps
        self._console = console or Console()
        self._on_phase = on_phase
        self._latest: dict[str, float] = {}
        self._step = start
        self._first: tuple[int, float] | None = None  # Step and time of the first update: start-up is not in the ETA.
        self._printed_at: float | None = None
        self._pending: str | None = None
        self._line = _LiveLine(stage, steps, start)
        self._live = Live(self._line, console=self._console, refresh_per_second=10)

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._line.end(self._numbers() if kind is None else None)
        self._live.stop()
        if self._pending is not None:
            self._print(self._pending)
            self._pending = None

    def phase(self, name: str) -> None:
        """Show the current phase, e.g. "starting workers"; the next phase or step replaces it."""
        self._on_phase(name)
        if self._console.is_terminal:
            self._line.details = [name]
        else:
            self._print(f"{self._stage}: {name}")

    def note(self, text: str) -> None:
        """Print a line of its own, above the live line."""
        self._print(text)

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show that `step` is finished. Numbers that are not in `metrics` keep their last value."""
        now = time.monotonic()
        if step <= self._step:
            self._first = None  # repeated steps: the time lost by a failure says nothing about the next steps
        self._step = step
        self._latest.update(metrics)
        left = self._time_left(step, now)
        details = [*([f"{left} left"] if left else []), *self._numbers()]
        if self._console.is_terminal:
            self._line.step, self._line.details = step, details
            return
        line = " · ".join([f"{self._stage} {step}/{self._steps}", *details])
        if self._printed_at is None or step >= self._steps or now - self._printed_at >= PLAIN_INTERVAL:
            self._printed_at, self._pending = now, None
            self._print(line)
        else:
            self._pending = line

    def _numbers(self) -> list[str]:
        return [f"{label} {show(self._latest[name])}" for name, label, show in _HEADLINES if name in self._latest]

    def _time_left(self, step: int, now: float) -> str:
        """h:mm:ss or m:ss by the mean time per step since the first; empty before the second step, and at the end."""
        if self._first is None:
            self._first = step, now
        first_step, first_time = self._first
        if step <= first_step or step >= self._steps:
            return ""
        return clock((now - first_time) / (step - first_step) * (self._steps - step))

    def _print(self, text: str) -> None:
        self._console.print(Text(text), soft_wrap=True)


class _LiveLine:
    """One line in a terminal of any width: stage and step, then the details that fit. Wide terminals also show the bar and the
    elapsed time."""

    def __init__(self, stage: str, steps: int, step: int) -> None:
        self.stage, self.steps, self.step = stage, steps, step
        self.details: list[str] = []
        self._began = time.monotonic()
        self._mark: Spinner | Text = Spinner("dots", style="green")
        self._took: str | None = None

    def end(self, details: list[str] | None) -> None:
        """Stop the animation. details: of a successful stage; None: the stage failed."""
        self._took = clock(time.monotonic() - self._began)
        self._mark = Text("-" if details is None else "✓", style="red" if details is None else "green")
        if details is not None:
            self.details = details

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        has_bar = options.max_width >= BAR_FROM
        width = options.max_width - 2 - (BAR + 1 if has_bar else 0)  # beside the mark and the bar
        text = Text.assemble((self.stage, "bold"), " ", (f"{self.step}/{self.steps}", "green"))
        if has_bar:
            text.append(f" · {self._took or clock(time.monotonic() - self._began)}")
        for number, detail in enumerate(self.details):
            if number and text.cell_len + 3 + len(detail) > width:
                break
            text.append(f" · {detail}")
        text.truncate(max(width, 1), overflow="ellipsis")
        bar = [ProgressBar(total=max(self.steps, 1), completed=self.step, width=BAR)] if has_bar else []
        row = Table.grid(padding=(0, 1, 0, 0))
        row.add_row(self._mark, *bar, text)
        yield row
