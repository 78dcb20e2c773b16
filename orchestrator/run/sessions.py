"""The duration of stages over all their sessions. A session's seconds are added to summary.json when it ends; if its driver was
killed, when the next session begins."""

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
    """Add the seconds of a killed driver's session, up to its last heartbeat. Call it before a new session begins."""
    if killed := _unended_session(run.folder):
        run.write(FILE, run.read(FILE) | {"ended": KILLED})
        add_seconds(run, *killed)


def stage_seconds(folder: Path) -> dict[Stage, float]:
    """Stage -> seconds of all its sessions. A session that runs, or whose driver was killed, counts up to its last heartbeat."""
    seconds: dict[Stage, float] = dict(_read(folder / "summary.json").get("seconds", {}))
    if session := _unended_session(folder):
        seconds[session[0]] = seconds.get(session[0], 0.0) + session[1]
    return seconds


def _unended_session(folder: Path) -> tuple[Stage, float] | None:
    """Stage and seconds of a session without an `ended` entry; None if there is none."""
    now = _read(folder / FILE)
    if "began" not in now or "ended" in now:
        return None
    return now["stage"], now["time"] - now["began"]


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
