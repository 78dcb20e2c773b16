"""Requests to stop a run: SIGTERM, Ctrl-C, `ray job stop`, a closed terminal."""

from __future__ import annotations

import signal
import threading
from types import FrameType

from rich.console import Console
from rich.text import Text

from orchestrator.run.run_dir import Run


class Stopped(RuntimeError):
    """The run stopped because it was asked to, with a checkpoint if a step was done."""

    def __init__(self, text: str, number: int) -> None:
        super().__init__(text)
        self.number = number
        """The signal's number."""


class StoppedAtOnce(KeyboardInterrupt):
    """The run was asked to stop a second time, and stopped within a step."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number
        """The signal's number."""


class StopSignal:
    """SIGTERM, SIGINT and SIGHUP: the first stops the run after its step, or after the grace time. A second SIGTERM or SIGINT
    stops it at once, a third ends the process."""

    def __init__(self, run: Run, console: Console) -> None:
        self._run, self._console = run, console
        self._number = 0

    @property
    def asked(self) -> bool:
        return self._number != 0

    def raise_if_requested(self, when: str) -> None:
        """Raises Stopped if the run was asked to stop."""
        if self.asked:
            signal.setitimer(signal.ITIMER_REAL, 0)
            raise Stopped(f"stopped {when}; {self._resume_hint()}", self._number)

    def __enter__(self) -> StopSignal:
        self._previous_handlers = {}
        if threading.current_thread() is threading.main_thread():
            signals = [signal.SIGTERM, signal.SIGINT]
            if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup ignores it
                signals.append(signal.SIGHUP)
            handlers = dict.fromkeys(signals, self._request_stop) | {signal.SIGALRM: self._end_of_grace}
            self._previous_handlers = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        return self

    def __exit__(self, *_: object) -> None:
        if self._previous_handlers:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)

    def _request_stop(self, number: int, frame: FrameType | None) -> None:
        previous, hangup = self._number, number == signal.SIGHUP
        if previous and hangup:
            return  # the user asked before, and then closed the terminal
        if previous not in (0, signal.SIGHUP):
            self._stop_at_once(number)
        self._number = number
        if previous:
            return
        grace = self._run.config.recovery.stop_grace
        signal.setitimer(signal.ITIMER_REAL, grace)
        self._say(
            f"stopping after this step, or in {grace:.0f} s within it (recovery.stop_grace); a second signal stops at once"
        )

    def _stop_at_once(self, number: int) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number_again in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number_again, signal.SIG_DFL)
        self._say(f"stopping at once; kept: {self._kept()}; {self._resume_hint()}")
        raise StoppedAtOnce(number)

    def _say(self, text: str) -> None:
        self._console.print(Text(text), soft_wrap=True)

    def _kept(self) -> str:
        """The work that a resumed run does not repeat."""
        finished = [stage for stage in self._run.stages if self._run.finished(stage)]
        kept = [f"the model of {stage}" for stage in finished]
        for stage in self._run.stages:
            if stage not in finished and (steps := self._run.checkpoints(stage)):
                kept.append(f"the checkpoint of {stage} after step {steps[-1]}")
        return ", ".join(kept) or "nothing: there is no checkpoint yet"

    def _resume_hint(self) -> str:
        return f"resume with: troupe resume {self._run.folder}"

    def _end_of_grace(self, number: int, frame: FrameType | None) -> None:
        self.raise_if_requested("within a step")
