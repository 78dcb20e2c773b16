"""A reward function in a process of its own: it may hang, crash or leave processes, and the worker goes on."""

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
_PATIENCE = 5.0
"""Seconds for the guard to kill what the function left."""


class FunctionProcess:
    """A function's process (workers/rewards/function_main.py), kept between calls; a fresh one takes the place of one that
    failed.

    It is started, not forked, since a worker holds the threads of torch; and it ends with the worker, however that ends.
    """

    def __init__(self, settings: FunctionSettings, setting: str, plugins: Sequence[str]) -> None:
        """Start importing the plugins and the function. setting: dotted path of the settings."""
        self.settings = settings
        self.setting = setting
        self.plugins = list(plugins)
        self.wants_samples = False
        """Whether the function wants records of the answers; known once it is imported."""
        self._ready = False
        self._launch()

    def wait_ready(self) -> None:
        """Until the function is imported. Raises RewardError that names the setting."""
        try:
            self._greet()
        except TimeoutError:
            self.close()
            raise RewardError(
                f"{self.setting}.start_timeout: {self.settings.function!r} was not imported in {self.settings.start_timeout:g} s"
            ) from None
        except (OSError, EOFError):
            self.close()
            raise RewardError(
                f"{self.setting}.function: {self._end()} while {self.settings.function!r} was imported"
            ) from None

    def score(
        self,
        prompts: Sequence[Any],
        answers: Sequence[str],
        columns: dict[str, list],
        samples: Sequence[SampleRecord] | None = None,
    ) -> RewardResult:
        """Scores of some answers, a batch at a time. samples: where the function wants them."""
        size = self.settings.batch_size or max(len(answers), 1)
        return RewardResult.join(
            [self._score(*batch) for batch in in_batches(prompts, answers, columns, samples, size)]
        )

    def close(self) -> None:
        """Kill the process and all that it started."""
        self._ready = False
        self._line.close()  # which the guard takes as its order
        try:
            self._process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()  # its child gets a SIGKILL with it
            self._process.wait()

    # ------------------------------------------------------------ one call

    def _score(
        self,
        prompts: Sequence[Any],
        answers: Sequence[str],
        columns: dict[str, list],
        samples: Sequence[SampleRecord] | None,
    ) -> RewardResult:
        if self._process.poll() is not None:  # since the last call; nothing is lost by it
            self._relaunch()
        try:
            self._greet()
            reply = self._exchange(self.settings.timeout, pickle.dumps((prompts, answers, columns, samples)))
        except RewardError as error:
            self._relaunch()
            return RewardResult.nothing(len(answers), str(error))
        except TimeoutError:
            limit = "timeout" if self._ready else "start_timeout"
            self._relaunch()
            seconds = getattr(self.settings, limit)
            return RewardResult.nothing(
                len(answers), f"no answer in {seconds:g} s ({self.setting}.{limit}): killed", late=True
            )
        except (OSError, EOFError):
            self.close()
            why = self._end()
            self._launch()
            return RewardResult.nothing(len(answers), why)
        if "error" in reply:
            return RewardResult.nothing(len(answers), reply["error"], detail=reply["traceback"])
        return RewardResult.of(reply["scores"], reply["numbers"])

    def _greet(self) -> None:
        """Wait for the process to say that it is ready. Raises RewardError where it says that it cannot be."""
        if not self._ready:
            reply = self._exchange(self.settings.start_timeout)
            if "error" in reply:
                raise RewardError(reply["error"])
            self._ready, self.wants_samples = True, reply["samples"]

    def _exchange(self, seconds: float, request: bytes = b"") -> dict[str, Any]:
        """Send a request, if any, and wait for a line of JSON. Raises TimeoutError, or EOFError or OSError where the process is
        gone."""
        deadline = time.monotonic() + seconds
        if request:  # to send nothing fails as well where the process is gone, though what it said last is still there
            self._line.settimeout(seconds)
            self._line.sendall(request)
        reply = bytearray()
        while not reply.endswith(b"\n"):
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            self._line.settimeout(left)
            part = self._line.recv(2**16)
            if not part:
                raise EOFError
            reply += part
        return json.loads(reply)

    # ------------------------------------------------------------ the process

    def _launch(self) -> None:
        """Start the process; `_greet` waits for it."""
        self._line, theirs = socket.socketpair()
        with theirs:
            what = {
                "line": theirs.fileno(),
                "setting": f"{self.setting}.function",
                "function": self.settings.function,
                "plugins": self.plugins,
            }
            # The path goes as an argument: in the environment it would reach every program that the function starts.
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-u", "-c", _START, json.dumps(sys.path), json.dumps(what)],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C is for the driver, which checkpoints before it ends its workers
            )

    def _relaunch(self) -> None:
        self.close()
        self._launch()

    def _end(self) -> str:
        """How the process ended, in words."""
        code = self._process.returncode
        number = -code if code < 0 else code - 128
        if number in list(signal.Signals):
            return f"its process died of {signal.Signals(number).name}"
        return f"its process ended with exit code {code}"
