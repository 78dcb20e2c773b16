"""Which failures a run survives: a policy that decides and counts. What is done then is the team's and the stage's affair."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from configs.schema import RecoverySettings, Role
from orchestrator.storage.failure_log import FailureLog
from orchestrator.worker_groups.failures import Failure, WorkerError


@dataclass(frozen=True)
class _Restart:
    time: float
    where: str
    """Stage and step."""


class FailurePolicy:
    """The budget of restarts, and the record of every failure.

    Args:
        settings: what may be spent.
        log: where each failure is written; none: nowhere.
        say: is told of each failure that the run goes on from, in a line.
    """

    def __init__(
        self,
        settings: RecoverySettings,
        log: FailureLog | None = None,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._settings = settings
        self._log = log
        self._say = say
        self._spent: dict[Role, list[_Restart]] = {}
        self.on_failure: Callable[[str, str], None] = lambda role, kind: None
        """Is told of every failure: the role, and what kind of failure."""

    @property
    def where(self) -> str:
        """Stage and step; empty where nobody says so."""
        return self._log.where if self._log else ""

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
                f"not replaced again: {self._settings.max_restarts} restarts in {self._settings.restart_window:g} s, or in one "
                "step, are allowed (recovery.max_restarts, recovery.restart_window)"
            )
            spent = WorkerError(replace(failure, text=f"{failure.text}\n  {note}"))
            spent.final = True
            raise spent from error
        self._say(f"{self.where}: {failure.text}".removeprefix(": "))

    def _left(self, failure: Failure) -> int | None:
        """Restarts left to the role that has the fewest, those now due taken off; none where nothing is due."""
        if not failure.survivable:
            return None
        now, left = _Restart(time.monotonic(), self.where), []
        for role in {role for role, _ in failure.failed_ranks} or {failure.role}:
            self._spent[role] = [r for r in (*self._spent.get(role, ()), now) if self._counts(r, now)]
            left.append(self._settings.max_restarts - len(self._spent[role]))
        return min(left)

    def _counts(self, restart: _Restart, now: _Restart) -> bool:
        """Whether it lies in the window, or in the step that is being tried: a step whose every attempt takes longer than the
        window would be tried for ever."""
        return now.time - restart.time <= self._settings.restart_window or bool(
            now.where and restart.where == now.where
        )

    def record(self, failure: Failure, consequence: str) -> None:
        """Write a failure, and what came of it, to a file of its own."""
        self.on_failure(failure.role, failure.kind)
        if self._log:
            self._log.write(f"{failure.role}-{failure.kind}", f"{failure.phase}: {failure}\n{consequence}")
