"""What runs in a function's process: a guard, and its child, which calls the function.

Requests (pickled) and replies (a line of JSON) go through one socket, so that what the function prints is only output. When
the owner closes its end, or dies, the guard kills its child and whatever processes the function left.
"""

from __future__ import annotations

import asyncio
import ctypes
import inspect
import json
import os
import pickle
import select
import signal
import socket
import traceback
from collections.abc import Awaitable
from contextlib import suppress
from importlib import import_module
from threading import Thread
from typing import Any, NoReturn, SupportsFloat

import psutil

from workers.rewards.function import (
    SAMPLES,
    RewardFunction,
    SampleRecord,
    as_sequence,
    find_function,
    wants_samples,
)

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h
_SHOWN_CHARACTERS = 300
_TRACEBACK_CHARACTERS = 8000


def main(line: int, setting: str, function: str, plugins: list[str]) -> None:
    """Serve a function on the socket with that file number."""
    connection = socket.socket(fileno=line)
    guard = os.getpid()
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)  # what the function's processes leave becomes the guard's child
    child = os.fork()
    if child:
        _guard(connection, child)
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != guard:  # it died before it could be told of
        return
    _serve(connection, setting, function, plugins)


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, ctypes.c_ulong(value)):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


# ---------------------------------------------------------------- the guard


def _guard(line: socket.socket, child: int) -> NoReturn:
    """Outlive the child, leave no process of the function, and end as the child did (128 + n after signal n)."""
    Thread(target=_kill_at_hangup, args=(line, child), daemon=True).start()
    pid, status = os.wait()
    while pid != child:  # others are what the function's processes left: their ends interest nobody
        pid, status = os.wait()
    while left := psutil.Process().children(recursive=True):
        for process in left:
            with suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(left, timeout=1.0)
    code = os.waitstatus_to_exitcode(status)
    os._exit(code if code >= 0 else 128 - code)


def _kill_at_hangup(line: socket.socket, child: int) -> None:
    poll = select.poll()
    poll.register(line, 0)  # nothing but the end of the connection; requests are the child's to read
    poll.poll()
    os.kill(child, signal.SIGKILL)


# ---------------------------------------------------------------- the calls


def _serve(line: socket.socket, setting: str, path: str, plugins: list[str]) -> None:
    """Say that the function is there (`{"samples": whether it wants records of the answers}`), then answer requests (prompts,
    answers, columns, records) until the owner leaves."""
    stream = line.makefile("rwb")

    def say(message: dict[str, Any]) -> None:
        stream.write(json.dumps(message).encode() + b"\n")
        stream.flush()

    try:
        for plugin in plugins:
            import_module(plugin)
        function = find_function(path, setting)
    except Exception as error:  # whatever a module raises when it is imported
        traceback.print_exc()
        say({"error": _short(str(error))})
        return
    say({"samples": wants_samples(function)})
    runner = asyncio.Runner()  # one event loop for all calls: clients that a function keeps are bound to theirs
    while True:
        try:
            request = pickle.load(stream)  # noqa: S301  written by the worker that started this process
        except EOFError:
            return
        say(_call(function, runner, *request))


def _call(
    function: RewardFunction,
    runner: asyncio.Runner,
    prompts: list[Any],
    answers: list[str],
    columns: dict[str, list],
    samples: list[SampleRecord] | None,
) -> dict[str, Any]:
    try:
        found = function(prompts, answers, **columns, **({} if samples is None else {SAMPLES: samples}))
        if inspect.isawaitable(found):
            found = runner.run(_result(found))
        return _plain(found, len(answers))
    except Exception as error:  # whatever the function raises
        traceback.print_exc()
        trace = "".join(traceback.format_exception(error))
        return {"error": _short(f"{type(error).__name__}: {error}"), "traceback": trace[-_TRACEBACK_CHARACTERS:]}


async def _result(awaitable: Awaitable[Any]) -> Any:
    return await awaitable


def _plain(values: Any, count: int) -> dict[str, Any]:
    """`scores`, one per answer: a number, None, or the text of what is neither; `numbers`: name -> what dicts say besides."""
    plain = as_sequence(values)
    if plain is None or len(plain) != count:
        raise ValueError(f"gave {_short(repr(values))} for {count} answers; a list with one number each is needed")
    scores = [_short(repr(v)) if isinstance(v, dict) and "score" not in v else _number(_score_of(v)) for v in plain]
    names = dict.fromkeys(name for v in plain if isinstance(v, dict) for name in v if name != "score")
    numbers = {str(name): [_number(v.get(name)) if isinstance(v, dict) else None for v in plain] for name in names}
    # What is a number of no answer at all is no measure: a text, say.
    return {
        "scores": scores,
        "numbers": {name: x for name, x in numbers.items() if any(isinstance(v, float) for v in x)},
    }


def _score_of(value: Any) -> Any:
    return value["score"] if isinstance(value, dict) else value


def _number(value: Any) -> float | str | None:
    if value is None:
        return None
    try:
        return float(value) if isinstance(value, SupportsFloat) else _short(repr(value))
    except Exception:  # of many elements, or too large: each library has its own
        return _short(repr(value))


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."
