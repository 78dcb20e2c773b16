"""What a run is doing: written by the driver as it goes, read by `troupe status`."""

from __future__ import annotations

import json
import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from orchestrator.run import Run, RunError

FILE = "status.json"


class Status:
    """status.json of one stage of a run."""

    def __init__(self, folder: Path, stage: str, steps: int, step: int) -> None:
        self._path = folder / FILE
        self._now: dict[str, Any] = {
            "stage": stage,
            "step": step,
            "steps": steps,
            "phase": "starting",
            "driver": {"host": socket.gethostname(), "pid": os.getpid()},
            "workers": [],
            "version": 0,
        }
        self.update()

    def update(self, **changes: Any) -> None:
        """Any of step, phase, version, workers."""
        self._now |= changes
        partial = self._path.with_name(FILE + ".partial")
        with suppress(OSError):  # to show it is not worth a run
            partial.write_text(json.dumps(self._now | {"time": round(time.time(), 3)}), encoding="utf-8")
            os.replace(partial, self._path)


def print_status(run: Run, console: Console) -> None:
    """What is known of a run that goes on, or of the last process that worked on it."""
    console.print(f"[bold]{run.config.name}[/bold]: {_condition(run)}", highlight=False)
    if now := run.read(FILE):
        ago = time.time() - now["time"]
        console.print(
            f"{now['stage']}: step {now['step']} of {now['steps']}, phase {now['phase']}, policy version {now['version']}; "
            f"driver {now['driver']['host']} pid {now['driver']['pid']}; {ago:.0f} s ago",
            highlight=False,
        )
        console.print(_workers(now["workers"]))
    failures = sorted((run.folder / "failures").glob("*.txt"))
    if failures:
        console.print(f"{len(failures)} failures in {run.folder / 'failures'}; the last:", highlight=False)
        console.print(failures[-1].read_text(encoding="utf-8").splitlines()[1], markup=False, highlight=False)


def _condition(run: Run) -> str:
    try:
        with run.locked():
            left = [stage for stage in run.stages if not run.finished(stage)]
    except RunError:
        return "running"
    return f"not running; to go on: troupe resume {run.folder}" if left else "finished"


def _workers(rows: list[dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("role", "rank", "node", "pid", "restarts"):
        table.add_column(name, justify="left" if name in ("role", "node") else "right")
    for row in rows:
        table.add_row(*(str(row[name]) for name in ("role", "rank", "node", "pid", "restarts")))
    return table
