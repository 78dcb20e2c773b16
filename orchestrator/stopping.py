"""Being asked to stop: SIGTERM, Ctrl-C, `ray job stop`."""

from __future__ import annotations

import signal
import threading
from types import FrameType

from rich.console import Console

from orchestrator.run import Run


class Stopped(RuntimeError):
    """The run was asked to stop, and did, with a checkpoint where there was something to keep."""

    def __init__(self, text: str, number: int) -> None:
        super().__init__(text)
        self.number = number
        """Of the signal."""


class StopSignal:
    """SIGTERM and SIGINT: the first asks the run to stop after its step, within the grace time; the second ends the process at
    once."""

    def __init__(self, run: Run, console: Console) -> None:
        self._run, self._console = run, console
        self._number = 0

    @property
    def asked(self) -> bool:
        return self._number != 0

    def heed(self, when: str) -> None:
        """Raises Stopped where the run was asked to stop."""
        if self.asked:
            signal.setitimer(signal.ITIMER_REAL, 0)
            raise Stopped(f"stopped {when}; go on with: troupe resume {self._run.folder}", self._number)

    def __enter__(self) -> StopSignal:
        self._before = {}
        if threading.current_thread() is threading.main_thread():
            handlers = {signal.SIGTERM: self._ask, signal.SIGINT: self._ask, signal.SIGALRM: self._end}
            self._before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        return self

    def __exit__(self, *_: object) -> None:
        if self._before:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self._number = number
        grace = self._run.config.recovery.grace
        signal.setitimer(signal.ITIMER_REAL, grace)
        self._console.print(
            f"stopping after this step, or in {grace:.0f} s before its end (recovery.grace); once more stops at once",
            soft_wrap=True,
        )

    def _end(self, number: int, frame: FrameType | None) -> None:
        self.heed("before the end of a step")
