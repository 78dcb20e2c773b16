"""What a run is doing, and how its last session ended: status.json, written by the driver, and what is read of it.

A session is what one driver's process does of one stage. The file says nothing of an end where the driver was killed.
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
SIGN_OF_LIFE = 5.0
"""Seconds between two times that a driver writes the file, whatever it does."""


class Status:
    """status.json of a session, until the `with` block ends.

    `step` is the last that is done. `began`, `phase_began` and `time`, the last sign of life, are seconds since the epoch.
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
        self._alive = Repeating(self._write, SIGN_OF_LIFE)

    def update(self, **changes: Any) -> None:
        """Any of step and version."""
        with self._lock:
            self._now |= changes
            self._write()

    def begin_phase(self, name: str) -> None:
        """Say what is going on from now on."""
        self.update(phase=name, phase_began=time.time())

    def watch(self, team: Team) -> None:
        """From now on show these workers, and which of them is waited for."""
        self._team = team
        self.update(workers=team.workers())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._alive.stop()
        self._team = None
        self.update(ended=ending(error))

    def _write(self) -> None:
        with self._lock:
            awaited = self._team.deadlines.awaited if self._team else None
            now = self._now | {"awaited": asdict(awaited) if awaited else None, "time": time.time()}
            partial = self._path.with_name(FILE + ".partial")
            with suppress(OSError):  # to show it is not worth a run
                partial.write_text(json.dumps(now), encoding="utf-8")
                os.replace(partial, self._path)


def ending(error: BaseException | None) -> dict[str, str]:
    """How a session ended: `how` is finished, stopped or failed, and `text` is the first line of why."""
    if error is None:
        return {"how": "finished", "text": ""}
    first = str(error).strip().partition("\n")[0]
    if isinstance(error, Stopped):
        return {"how": "stopped", "text": first.partition(";")[0]}
    if isinstance(error, KeyboardInterrupt):
        return {"how": "stopped", "text": "stopped at once, in the middle of a step"}
    return {"how": "failed", "text": f"{type(error).__name__}: {first}" if first else type(error).__name__}
