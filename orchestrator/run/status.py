"""status.json, written by the driver: what a run is doing, and how its last session ended.

A session is the work of one driver process on one stage. After a killed driver the file has no `ended` entry.
"""

from __future__ import annotations

import json
import os
import socket
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from threading import RLock
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from orchestrator.periodic import Repeating
from orchestrator.run.stop_signal import Stopped

if TYPE_CHECKING:
    from orchestrator.worker_groups.team import Team

FILE = "status.json"
HEARTBEAT_S = 5.0
"""Seconds between two writes of the file."""


class Status:
    """status.json of a session, until the `with` block ends.

    `step` is the last finished step. `began`, `phase_began` and `time` (the last heartbeat) are seconds since the epoch.
    """

    def __init__(self, folder: Path, stage: str, steps: int, step: int) -> None:
        self._path = folder / FILE
        self._lock = RLock()
        self._team: Team | None = None
        now = time.time()
        self._now: dict[str, Any] = {
            "stage": stage,
            "step": step,
            "steps": steps,
            "phase": "starting",
            "phase_began": now,
            "driver": {"host": socket.gethostname(), "pid": os.getpid()},
            "workers": [],
            "version": 0,
            "began": now,
        }
        self._write()
        self._heartbeat = Repeating(self._write, HEARTBEAT_S)

    def update(self, **changes: Any) -> None:
        """changes: step, version or both."""
        with self._lock:
            self._now |= changes
            self._write()

    def begin_phase(self, name: str) -> None:
        """Record the phase that begins now."""
        self.update(phase=name, phase_began=time.time())

    def watch(self, team: Team) -> None:
        """Show these workers from now on, and the call that the driver waits for."""
        self._team = team
        self.update(workers=team.workers())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._heartbeat.stop()
        self._team = None
        self.update(ended=ending(error))

    def _write(self) -> None:
        with self._lock:
            awaited = self._team.deadlines.awaited if self._team else None
            now = self._now | {"awaited": asdict(awaited) if awaited else None, "time": time.time()}
            partial = self._path.with_name(FILE + ".partial")
            with suppress(OSError):  # a missing status must not end a run
                partial.write_text(json.dumps(now), encoding="utf-8")
                os.replace(partial, self._path)


def ending(error: BaseException | None) -> dict[str, str]:
    """How a session ended. `how`: finished, stopped or failed. `text`: the first line of the reason."""
    if error is None:
        return {"how": "finished", "text": ""}
    first = str(error).strip().partition("\n")[0]
    if isinstance(error, Stopped):
        return {"how": "stopped", "text": first.partition(";")[0]}
    if isinstance(error, KeyboardInterrupt):
        return {"how": "stopped", "text": "stopped at once, in the middle of a step"}
    return {"how": "failed", "text": f"{type(error).__name__}: {first}" if first else type(error).__name__}
