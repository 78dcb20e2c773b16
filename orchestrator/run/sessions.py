"""How long stages take over all their sessions. What a session took is added to summary.json when it ends; of one whose driver
was killed, when the next begins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from orchestrator.run.run_dir import Run
from orchestrator.run.status import FILE
from placement.types import Stage

KILLED = {"how": "killed", "text": "the driver was killed"}


def add_seconds(run: Run, stage: Stage, seconds: float) -> None:
    """Add a session's seconds to the stage's. Raises DiskError."""
    summary = run.read("summary.json")
    summary.setdefault("seconds", {})[stage] = summary.get("seconds", {}).get(stage, 0.0) + seconds
    run.write("summary.json", summary)


def count_killed(run: Run) -> None:
    """Add what a killed driver's session took, up to its last sign of life. Call it before a new session begins."""
    if lost := _under_way(run.folder):
        run.write(FILE, run.read(FILE) | {"ended": KILLED})
        add_seconds(run, *lost)


def stage_seconds(folder: Path) -> dict[Stage, float]:
    """Of a run's folder the seconds of each stage, all its sessions together. One that goes on, or whose driver was killed,
    counts up to its last sign of life."""
    seconds: dict[Stage, float] = dict(_read(folder / "summary.json").get("seconds", {}))
    if session := _under_way(folder):
        seconds[session[0]] = seconds.get(session[0], 0.0) + session[1]
    return seconds


def _under_way(folder: Path) -> tuple[Stage, float] | None:
    """The stage and the seconds of a session that noted no end."""
    now = _read(folder / FILE)
    if "began" not in now or "ended" in now:
        return None
    return now["stage"], now["time"] - now["began"]


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
