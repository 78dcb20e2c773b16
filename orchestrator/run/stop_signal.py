"""Being asked to stop: SIGTERM, Ctrl-C, `ray job stop`, a terminal that is closed."""

from __future__ import annotations

import signal
import threading
from types import FrameType

from rich.console import Console
from rich.text import Text

from orchestrator.run.run_dir import Run


class Stopped(RuntimeError):
    """The run was asked to stop, and did, with a checkpoint where there was something to keep."""

    def __init__(self, text: str, number: int) -> None:
        super().__init__(text)
        self.number = number
        """Of the signal."""


class StoppedAtOnce(KeyboardInterrupt):
    """The run was asked to stop a second time, and did not wait for the end of its step."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number
        """Of the signal."""


class StopSignal:
    """SIGTERM, SIGINT and SIGHUP: the first asks the run to stop after its step, within the grace time. A second SIGTERM or
    SIGINT stops it at once, a third ends the process."""

    def __init__(self, run: Run, console: Console) -> None:
        self._run, self._console = run, console
        self._number = 0

    @property
    def asked(self) -> bool:
        return self._number != 0

    def raise_if_requested(self, when: str) -> None:
        """Raises Stopped where the run was asked to stop."""
        if self.asked:
            signal.setitimer(signal.ITIMER_REAL, 0)
            raise Stopped(f"stopped {when}; {self._how_to_go_on()}", self._number)

    def __enter__(self) -> StopSignal:
        self._before = {}
        if threading.current_thread() is threading.main_thread():
            asking = [signal.SIGTERM, signal.SIGINT]
            if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as it is under nohup
                asking.append(signal.SIGHUP)
            handlers = dict.fromkeys(asking, self._ask) | {signal.SIGALRM: self._end}
            self._before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        return self

    def __exit__(self, *_: object) -> None:
        if self._before:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        before, hangup = self._number, number == signal.SIGHUP
        if before and hangup:
            return  # who asked has closed the terminal since
        if before not in (0, signal.SIGHUP):
            self._stop_at_once(number)
        self._number = number
        if before:
            return
        grace = self._run.config.recovery.grace
        signal.setitimer(signal.ITIMER_REAL, grace)
        self._say(
            f"stopping after this step, or in {grace:.0f} s before its end (recovery.grace); once more stops at once"
        )

    def _stop_at_once(self, number: int) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for again in (signal.SIGTERM, signal.SIGINT):
            signal.signal(again, signal.SIG_DFL)
        self._say(f"stopping at once; kept: {self._kept()}; {self._how_to_go_on()}")
        raise StoppedAtOnce(number)

    def _say(self, text: str) -> None:
        self._console.print(Text(text), soft_wrap=True)

    def _kept(self) -> str:
        """What a resumed run does not have to do again."""
        finished = [stage for stage in self._run.stages if self._run.finished(stage)]
        kept = [f"the model of {stage}" for stage in finished]
        for stage in self._run.stages:
            if stage not in finished and (steps := self._run.checkpoints(stage)):
                kept.append(f"the checkpoint of {stage} after step {steps[-1]}")
        return ", ".join(kept) or "nothing, as there is no checkpoint yet"

    def _how_to_go_on(self) -> str:
        return f"go on with: troupe resume {self._run.folder}"

    def _end(self, number: int, frame: FrameType | None) -> None:
        self.raise_if_requested("before the end of a step")
