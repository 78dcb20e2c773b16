"""Which failures a run survives. The policy decides and counts; Team and Runner act on its decision."""

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


@dataclass(frozen=True)
class Restart:
    """Decision: replace the failed workers and go on."""

    left: int
    """Further restarts in the budget of the role that has the fewest."""


Decision = Restart | WorkerError
"""Go on after a restart, or raise this final error: the run ends."""


class FailurePolicy:
    """The budget of restarts, and the record of every failure.

    Args:
        settings: the budget.
        log: where each failure is written; none: nowhere.
        say: called with one line for each failure that the run survives.
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
        """Called for every failure: (role, kind of failure)."""

    @property
    def where(self) -> str:
        """Stage and step; empty without a log."""
        return self._log.where if self._log else ""

    def decide(self, error: WorkerError) -> Decision:
        """Record and count a failure. The decision is a final error if no restart helps, or if the budget is spent."""
        failure = error.failure
        if not failure.survivable:
            self.record(failure, "not survivable")
            error.final = True
            return error
        left = self._spend(failure)
        self.record(failure, f"restarts left: {left}" if left >= 0 else "no restart left")
        if left >= 0:
            self._say(f"{self.where}: {failure.text}".removeprefix(": "))
            return Restart(left)
        note = (
            f"not replaced again: at most {self._settings.max_restarts} restarts in {self._settings.restart_window:g} s, or in "
            "one step, are allowed (recovery.max_restarts, recovery.restart_window)"
        )
        final = WorkerError(replace(failure, text=f"{failure.text}\n  {note}"))
        final.final, final.__cause__ = True, error
        return final

    def _spend(self, failure: Failure) -> int:
        """Count a restart for each failed role; the restarts left to the role that has the fewest, negative if over budget."""
        now, left = _Restart(time.monotonic(), self.where), []
        for role in {role for role, _ in failure.failed_ranks} or {failure.role}:
            self._spent[role] = [r for r in (*self._spent.get(role, ()), now) if self._counts(r, now)]
            left.append(self._settings.max_restarts - len(self._spent[role]))
        return min(left)

    def _counts(self, restart: _Restart, now: _Restart) -> bool:
        """Whether a restart is in the window or in the current step. By the window alone, a step whose attempts each take
        longer than the window would be repeated for ever."""
        return now.time - restart.time <= self._settings.restart_window or bool(
            now.where and restart.where == now.where
        )

    def record(self, failure: Failure, consequence: str) -> None:
        """Write a failure and its consequence to a file of its own."""
        self.on_failure(failure.role, failure.kind)
        if self._log:
            self._log.write(f"{failure.role}-{failure.kind}", f"{failure.phase}: {failure}\n{consequence}")
