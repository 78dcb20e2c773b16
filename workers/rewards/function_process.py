"""A reward function in a process of its own: the worker survives if it hangs, crashes or leaves processes behind."""

from __future__ import annotations

import json
import pickle
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from configs.schema import FunctionSettings
from workers.rewards.function import RewardError, SampleRecord
from workers.rewards.result import RewardResult, in_batches

_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); import troupe.imports; "
    "from workers.rewards.function_main import main; main(**json.loads(sys.argv[2]))"
)
_KILL_TIMEOUT = 5.0
"""Seconds for the guard to kill all processes of the function."""


class FunctionProcess:
    """A function's process (workers/rewards/function_main.py), kept between calls and replaced after a failure.

    It is spawned, not forked, since a worker has threads of torch. It ends with the worker, however the worker ends.
    """

    def __init__(self, settings: FunctionSettings, setting: str, plugins: Sequence[str]) -> None:
        """Start importing the plugins and the function. setting: dotted path of the settings."""
        self.settings = settings
        self.setting = setting
        self.plugins = list(plugins)
        self.wants_samples = False
        """Whether the function wants records of the answers; valid once it is imported."""
        self._ready = False
        self._launch()

    def wait_ready(self) -> None:
        """Wait until the function is imported. Raises RewardError, which names the setting."""
        try:
            self._await_ready()
        except TimeoutError:
            self.close()
            raise RewardError(
                f"{self.setting}.start_timeout: {self.settings.function!r} was not imported in {self.settings.start_timeout:g} s"
            ) from None
        except (OSError, EOFError):
            self.close()
            raise RewardError(
                f"{self.setting}.function: {self._exit_text()} while {self.settings.function!r} was imported"
            ) from None

    def score(
        self,
        prompts: Sequence[Any],
        answers: Sequence[str],
        columns: dict[str, list],
        samples: Sequence[SampleRecord] | None = None,
    ) -> RewardResult:
        """Scores of the answers, a batch per call. samples: records, where the function wants them."""
        size = self.settings.batch_size or max(len(answers), 1)
        return RewardResult.join(
            [self._score(*batch) for batch in in_batches(prompts, answers, columns, samples, size)]
        )

    def close(self) -> None:
        """Kill the process and all processes that it started."""
        self._ready = False
        self._socket.close()  # the guard then kills all of them
        try:
            self._process.wait(_KILL_TIMEOUT)
        except subprocess.TimeoutExpired:
            self._process.kill()  # the kernel then kills its child
            self._process.wait()

    # ------------------------------------------------------------ one call

    def _score(
        self,
        prompts: Sequence[Any],
        answers: Sequence[str],
        columns: dict[str, list],
        samples: Sequence[SampleRecord] | None,
    ) -> RewardResult:
        if self._process.poll() is not None:  # it ended after the last call; no result is lost
            self._relaunch()
        try:
            self._await_ready()
            reply = self._exchange(self.settings.timeout, pickle.dumps((prompts, answers, columns, samples)))
        except RewardError as error:
            self._relaunch()
            return RewardResult.nothing(len(answers), str(error))
        except TimeoutError:
            limit = "timeout" if self._ready else "start_timeout"
            self._relaunch()
            seconds = getattr(self.settings, limit)
            return RewardResult.nothing(
                len(answers), f"no answer in {seconds:g} s ({self.setting}.{limit}): killed", timed_out=True
            )
        except (OSError, EOFError):
            self.close()
            why = self._exit_text()
            self._launch()
            return RewardResult.nothing(len(answers), why)
        if "error" in reply:
            return RewardResult.nothing(len(answers), reply["error"], detail=reply["traceback"])
        return RewardResult.of(reply["scores"], reply["numbers"])

    def _await_ready(self) -> None:
        """Wait until the process reports that it is ready. Raises RewardError where it reports an error."""
        if not self._ready:
            reply = self._exchange(self.settings.start_timeout)
            if "error" in reply:
                raise RewardError(reply["error"])
            self._ready, self.wants_samples = True, reply["samples"]

    def _exchange(self, seconds: float, request: bytes = b"") -> dict[str, Any]:
        """Send a request, if any, and wait for a line of JSON. Raises TimeoutError; EOFError or OSError if the process has
        ended."""
        deadline = time.monotonic() + seconds
        if request:  # sending nothing would fail if the process has ended, and its last reply can still be read
            self._socket.settimeout(seconds)
            self._socket.sendall(request)
        reply = bytearray()
        while not reply.endswith(b"\n"):
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise TimeoutError
            self._socket.settimeout(remaining)
            data = self._socket.recv(2**16)
            if not data:
                raise EOFError
            reply += data
        return json.loads(reply)

    # ------------------------------------------------------------ the process

    def _launch(self) -> None:
        """Start the process; `_await_ready` waits for it."""
        self._socket, child_end = socket.socketpair()
        with child_end:
            arguments = {
                "descriptor": child_end.fileno(),
                "setting": f"{self.setting}.function",
                "function": self.settings.function,
                "plugins": self.plugins,
            }
            # The path is an argument: in the environment, every program that the function starts would inherit it.
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-u", "-c", _START, json.dumps(sys.path), json.dumps(arguments)],
                stdin=subprocess.DEVNULL,
                pass_fds=[child_end.fileno()],
                start_new_session=True,  # Ctrl-C must reach only the driver, which checkpoints before it ends its workers
            )

    def _relaunch(self) -> None:
        self.close()
        self._launch()

    def _exit_text(self) -> str:
        """Text that says how the process ended."""
        code = self._process.returncode
        number = -code if code < 0 else code - 128
        if number in list(signal.Signals):
            return f"its process died of {signal.Signals(number).name}"
        return f"its process ended with exit code {code}"
