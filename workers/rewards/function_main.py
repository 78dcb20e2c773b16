"""Main program of a function's process: a guard, and its child, which calls the function.

Requests (pickled) and replies (one line of JSON) go through a socket: whatever the function prints is only output. When the owner
closes its end, or dies, the guard kills its child and all processes that the function started.
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


def main(descriptor: int, setting: str, function: str, plugins: list[str]) -> None:
    """Serve a function on the socket with this file descriptor."""
    connection = socket.socket(fileno=descriptor)
    guard = os.getpid()
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)  # orphans of the function's processes become children of the guard
    child = os.fork()
    if child:
        _guard(connection, child)
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != guard:  # the guard died before the line above
        return
    _serve(connection, setting, function, plugins)


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, ctypes.c_ulong(value)):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


# ---------------------------------------------------------------- the guard


def _guard(connection: socket.socket, child: int) -> NoReturn:
    """Wait for the child, kill all remaining processes, then exit with the child's exit code (128 + n after signal n)."""
    Thread(target=_kill_at_hangup, args=(connection, child), daemon=True).start()
    pid, status = os.wait()
    while pid != child:  # others are orphans of the function's processes
        pid, status = os.wait()
    while left := psutil.Process().children(recursive=True):
        for process in left:
            with suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(left, timeout=1.0)
    code = os.waitstatus_to_exitcode(status)
    os._exit(code if code >= 0 else 128 - code)


def _kill_at_hangup(connection: socket.socket, child: int) -> None:
    poll = select.poll()
    poll.register(connection, 0)  # only the end of the connection: the child reads the requests
    poll.poll()
    os.kill(child, signal.SIGKILL)


# ---------------------------------------------------------------- the calls


def _serve(connection: socket.socket, setting: str, path: str, plugins: list[str]) -> None:
    """Report that the function is imported (`{"samples": whether it wants records of the answers}`), then answer requests
    (prompts, answers, columns, records) until the owner closes the socket."""
    stream = connection.makefile("rwb")

    def send(message: dict[str, Any]) -> None:
        stream.write(json.dumps(message).encode() + b"\n")
        stream.flush()

    try:
        for plugin in plugins:
            import_module(plugin)
        function = find_function(path, setting)
    except Exception as error:  # importing a module may raise anything
        traceback.print_exc()
        send({"error": _short(str(error))})
        return
    send({"samples": wants_samples(function)})
    runner = asyncio.Runner()  # one event loop for all calls: clients that a function keeps are bound to their loop
    while True:
        try:
            request = pickle.load(stream)  # noqa: S301  written by the worker that started this process
        except EOFError:
            return
        send(_call(function, runner, *request))


def _call(
    function: RewardFunction,
    runner: asyncio.Runner,
    prompts: list[Any],
    answers: list[str],
    columns: dict[str, list],
    samples: list[SampleRecord] | None,
) -> dict[str, Any]:
    try:
        scores = function(prompts, answers, **columns, **({} if samples is None else {SAMPLES: samples}))
        if inspect.isawaitable(scores):
            scores = runner.run(_await(scores))
        return _to_json(scores, len(answers))
    except Exception as error:  # the function may raise anything
        traceback.print_exc()
        trace = "".join(traceback.format_exception(error))
        return {"error": _short(f"{type(error).__name__}: {error}"), "traceback": trace[-_TRACEBACK_CHARACTERS:]}


async def _await(awaitable: Awaitable[Any]) -> Any:
    return await awaitable


def _to_json(values: Any, count: int) -> dict[str, Any]:
    """`scores`, one per answer: a number, None, or the text of anything else. `numbers`: name -> the dicts' further values."""
    plain = as_sequence(values)
    if plain is None or len(plain) != count:
        raise ValueError(f"gave {_short(repr(values))} for {count} answers; a list with one number each is needed")
    scores = [_short(repr(v)) if isinstance(v, dict) and "score" not in v else _number(_score_of(v)) for v in plain]
    names = dict.fromkeys(name for v in plain if isinstance(v, dict) for name in v if name != "score")
    numbers = {str(name): [_number(v.get(name)) if isinstance(v, dict) else None for v in plain] for name in names}
    # Drop names that have no number for any answer, such as texts.
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
    except Exception:  # of several elements, or too large: the type depends on the library
        return _short(repr(value))


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."
