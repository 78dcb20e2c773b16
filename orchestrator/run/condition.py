"""The condition of a run, from the files in its folder: whether it goes on, how it ended, how far it came."""

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

SILENT = 30.0
"""Seconds without a sign of life after which a driver that holds the run is taken for stopped or hung."""


@dataclass(frozen=True)
class Condition:
    """What is known of a run."""

    state: State
    """new: nothing was done. silent: a driver holds the run, and gives no sign of life. killed: its driver is gone, and noted no
    end. The others say how the last session ended."""
    why: str
    """Of a session that ended before its time: the first line of the reason."""
    now: dict[str, Any]
    """The latest status.json; empty where there is none."""
    left: list[Stage]
    """Stages that are not finished."""
    seconds: dict[Stage, float]
    """Of each stage, all its sessions together, one that goes on among them."""

    @classmethod
    def of(cls, run: Run) -> Condition:
        """Reads only; another process may be at work in the run."""
        now, left = run.read(FILE), [stage for stage in run.stages if not run.finished(stage)]
        seconds = stage_seconds(run.folder)
        goes_on = bool(now) and "ended" not in now
        silent = goes_on and time.time() - now["time"] > SILENT
        # Not every file system shows locks to other machines.
        elsewhere = goes_on and not silent and now["driver"]["host"] != socket.gethostname()
        if run.at_work() or elsewhere:
            return cls("silent" if silent else "running", "", now, left, seconds)
        if run.stages and not left:
            return cls("finished", "", now, left, seconds)
        if not now:
            return cls("new", "", now, left, seconds)
        ended = now.get("ended", KILLED)
        if ended["how"] == "finished":
            return cls("stopped", f"the driver ended before the {left[0]} stage began", now, left, seconds)
        return cls(ended["how"], ended["text"], now, left, seconds)
