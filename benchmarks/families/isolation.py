"""Runs a family's checks in subprocesses, forked after all imports."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.families import checks
from benchmarks.families.report import Family
from benchmarks.families.zoo import make

Check = Callable[[Path, Path], dict[str, Any]]


def check(name: str, scratch: Path, limit: float) -> Family:
    """Check a family. limit: seconds for each of its processes; their logs are in `scratch`."""
    made = _run_isolated(_make, name, scratch / "model", scratch / "make.log", limit)
    if "error" in made:
        return Family(name, merged=made, alone=made)
    reports = {}
    for part, work in (("merged", checks.merged), ("alone", checks.alone)):
        (scratch / part).mkdir()
        reports[part] = _run_isolated(work, scratch / "model", scratch / part, scratch / f"{part}.log", limit)
    return Family(name, **reports)


def _make(name: Any, folder: Path) -> dict[str, Any]:
    make(folder, name)
    return {}


def _run_isolated(
    work: Callable[..., dict[str, Any]], what: Any, folder: Path, log: Path, limit: float
) -> dict[str, Any]:
    """Result of work(what, folder) in its own process group; `error` if it fails, crashes or takes too long."""
    context = get_context("fork")
    mine, theirs = context.Pipe()
    process = context.Process(target=_run, args=(theirs, work, what, folder, log))
    process.start()
    theirs.close()
    result: dict[str, Any] = {"error": f"took more than {limit:.0f} s"}
    try:
        if mine.poll(limit):
            result = mine.recv()
    except EOFError:
        process.join()
        result = {"error": f"its process ended with {process.exitcode}"}
    if process.is_alive() and process.pid:
        os.killpg(process.pid, signal.SIGKILL)  # and its engine
    process.join()
    if "error" in result:
        print(*log.read_text(errors="replace").splitlines()[-20:], sep="\n", file=sys.stderr)
    return result


def _run(connection: Connection, work: Callable[..., dict[str, Any]], what: Any, folder: Path, log: Path) -> None:
    os.setsid()
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        connection.send(work(what, folder))
    except Exception as error:
        traceback.print_exc()
        lines = str(error).splitlines() or [""]
        connection.send({"error": f"{type(error).__name__}: {lines[0]}"})
    finally:
        sys.stdout.flush()
        os.killpg(0, signal.SIGKILL)  # with its engine
