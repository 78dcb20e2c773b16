"""Which failures a run survives: a policy that decides and counts. What is done then is the team's and the stage's affair."""

from __future__ import annotations

import time
from collections import deque
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from configs.schema import RecoverySettings, Role
from orchestrator.failures import Failure, WorkerError


class Recovery:
    """The budget of restarts, and the record of every failure.

    Args:
        settings: what may be spent.
        folder: where each failure is written to a file of its own; none: nowhere.
    """

    def __init__(self, settings: RecoverySettings, folder: Path | None = None) -> None:
        self._settings = settings
        self._folder = folder
        self._spent: dict[Role, deque[float]] = {}
        self.where = ""
        """Stage and step, for the records."""

    def consider(self, error: WorkerError) -> None:
        """Record a failure; return where the run may go on. Raises it as final where nothing is to be replaced or the budget is
        spent."""
        failure = error.failure
        left = self._left(failure)
        self.record(
            failure, "not survivable" if left is None else f"restarts left: {left}" if left >= 0 else "no restart left"
        )
        if left is None:
            error.final = True
            raise error
        if left < 0:
            note = (
                f"not replaced again: {self._settings.restarts} restarts in {self._settings.window:g} s are allowed "
                "(recovery.restarts, recovery.window)"
            )
            spent = WorkerError(replace(failure, text=f"{failure.text}\n  {note}"))
            spent.final = True
            raise spent from error

    def _left(self, failure: Failure) -> int | None:
        """Restarts left to the role that has the fewest, those now due taken off; none where nothing is due."""
        if not failure.survivable:
            return None
        now, left = time.monotonic(), []
        for role in {role for role, _ in failure.casualties} or {failure.role}:
            times = self._spent.setdefault(role, deque())
            times.append(now)
            while now - times[0] > self._settings.window:
                times.popleft()
            left.append(self._settings.restarts - len(times))
        return min(left)

    def record(self, failure: Failure, consequence: str) -> None:
        """Write a failure, and what came of it, to a file of its own."""
        if self._folder is None:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        number = len(list(self._folder.glob("*.txt"))) + 1
        text = f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {self.where}\n{failure.phase}: {failure}\n{consequence}\n"
        with suppress(OSError):  # what failed matters more than that the disk is full
            (self._folder / f"{number:04d}-{failure.role}-{failure.kind}.txt").write_text(text, encoding="utf-8")
