"""Looking at a worker's process from outside: where it is, whether it lives, what it does, what it wrote last."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil
import ray

State = Literal["running", "stopped", "gone", "node lost"]


@dataclass(frozen=True)
class ProcessLocation:
    """Where a worker's process is."""

    node: str
    """Ray's id of the node."""
    host: str
    """Its address."""
    pid: int
    born: float
    """When the process was created: a later one may have the same pid."""
    logs: tuple[str, ...]
    """Files that its output goes to."""


@dataclass(frozen=True)
class ProcessState:
    """What was found of a process."""

    state: State
    log: str = ""
    """The end of what it wrote."""
    stack: str = ""
    """Python stacks of its threads, where it lives."""


def location() -> ProcessLocation:
    """Of this process."""
    context = ray.get_runtime_context()
    process = psutil.Process()
    logs = tuple(path for fd in (1, 2) if (path := os.path.realpath(f"/proc/self/fd/{fd}")).startswith("/"))
    return ProcessLocation(
        context.get_node_id(), ray.util.get_node_ip_address(), process.pid, process.create_time(), logs
    )


def proportional_memory() -> int:
    """Bytes of this process: proportional set size, so that shared pages count once over all processes."""
    info = psutil.Process().memory_full_info()
    return int(getattr(info, "pss", info.rss))


def examine(places: Sequence[ProcessLocation], lines: int, stacks: Sequence[bool]) -> list[ProcessState]:
    """Examine processes of this node: the last `lines` lines of each one's output and, of those marked in `stacks`, what it is
    doing. All at once: one after the other, many that are slow to show their stacks would take minutes."""
    with ThreadPoolExecutor(max(len(places), 1)) as pool:
        return list(pool.map(_examine, places, [lines] * len(places), stacks))


def end(places: Sequence[ProcessLocation]) -> None:
    """Kill processes of this node, stopped ones too."""
    for place in dict.fromkeys(places):  # roles may share a process
        if (process := _process(place)) is not None:
            process.send_signal(signal.SIGKILL)


def _process(place: ProcessLocation) -> psutil.Process | None:
    try:
        process = psutil.Process(place.pid)
        same = abs(process.create_time() - place.born) < 1.0
        return process if same and process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD) else None
    except psutil.NoSuchProcess:
        return None


def _examine(place: ProcessLocation, lines: int, stack: bool) -> ProcessState:
    process, log = _process(place), "\n".join(_tail(path, lines) for path in place.logs)
    if process is None:
        return ProcessState("gone", log)
    stopped = process.status() == psutil.STATUS_STOPPED
    return ProcessState("stopped" if stopped else "running", log, _stack(place.pid) if stack else "")


def _stack(pid: int) -> str:
    program = str(Path(sys.executable).with_name("py-spy"))  # it comes with Ray
    # --nonblocking: a stopped process would never reach the point at which it may be paused.
    command = [program, "dump", "--nonblocking", "--pid", str(pid)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except subprocess.TimeoutExpired:
        return "(py-spy gave no answer in 20 s)"
    return done.stdout if done.returncode == 0 else f"(py-spy: {done.stderr.strip()[-300:]})"


def _tail(path: str, lines: int) -> str:
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.path.getsize(path) - 2**16))
            text = file.read().decode(errors="replace").splitlines()[-lines:]
    except OSError as error:
        return f"{os.path.basename(path)}: {error.strerror}"
    return "\n".join([f"{os.path.basename(path)}:", *(f"  {line}" for line in text)])
