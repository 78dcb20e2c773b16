"""The condition of a run, from the files in its folder: whether it runs, how it ended, and its progress."""

from __future__ import annotations

import socket
import time
from dataclasses import dataclass
from typing import Any, Literal

from orchestrator.run.run_dir import Run
from orchestrator.run.sessions import KILLED, stage_seconds
from orchestrator.run.status import FILE
from placement.types import Stage

State = Literal["new", "running", "silent", "finished", "stopped", "failed", "killed"]

SILENT_AFTER_S = 30.0
"""Seconds without a heartbeat after which a driver counts as stopped or hung."""


@dataclass(frozen=True)
class Condition:
    """State and progress of a run."""

    state: State
    """new: no stage has begun. silent: a driver has locked the run, but gives no heartbeat. killed: its driver is gone without an
    entry in status.json. stopped, failed, finished: how the last session ended."""
    why: str
    """Why a session ended early: the first line of the reason."""
    now: dict[str, Any]
    """The latest status.json; empty if there is none."""
    left: list[Stage]
    """Unfinished stages."""
    seconds: dict[Stage, float]
    """Stage -> seconds of all its sessions, including a running one."""

    @classmethod
    def of(cls, run: Run) -> Condition:
        """Reads only: another process may be running the run."""
        now, left = run.read(FILE), [stage for stage in run.stages if not run.finished(stage)]
        seconds = stage_seconds(run.folder)
        running = bool(now) and "ended" not in now
        silent = running and time.time() - now["time"] > SILENT_AFTER_S
        # Some file systems do not show locks to other machines.
        elsewhere = running and not silent and now["driver"]["host"] != socket.gethostname()
        if run.is_locked() or elsewhere:
            return cls("silent" if silent else "running", "", now, left, seconds)
        if run.stages and not left:
            return cls("finished", "", now, left, seconds)
        if not now:
            return cls("new", "", now, left, seconds)
        ended = now.get("ended", KILLED)
        if ended["how"] == "finished":
            return cls("stopped", f"the driver ended before the {left[0]} stage began", now, left, seconds)
        return cls(ended["how"], ended["text"], now, left, seconds)
