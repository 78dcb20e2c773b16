"""Inspecting a worker's process from outside: its location, state, stack and last output."""

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
    """Node and identity of a worker's process."""

    node: str
    """Ray's id of the node."""
    host: str
    """Its address."""
    pid: int
    born: float
    """Creation time of the process: a later process may have the same pid."""
    logs: tuple[str, ...]
    """Files with its output."""


@dataclass(frozen=True)
class ProcessState:
    """Result of an inspection."""

    state: State
    log: str = ""
    """The end of its output."""
    stack: str = ""
    """Python stacks of its threads, if it runs."""


def location() -> ProcessLocation:
    """Location of this process."""
    context = ray.get_runtime_context()
    process = psutil.Process()
    logs = tuple(path for fd in (1, 2) if (path := os.path.realpath(f"/proc/self/fd/{fd}")).startswith("/"))
    return ProcessLocation(
        context.get_node_id(), ray.util.get_node_ip_address(), process.pid, process.create_time(), logs
    )


def proportional_memory() -> int:
    """Bytes of this process: proportional set size, which counts shared pages once over all processes."""
    info = psutil.Process().memory_full_info()
    return int(getattr(info, "pss", info.rss))


def inspect(locations: Sequence[ProcessLocation], lines: int, stacks: Sequence[bool]) -> list[ProcessState]:
    """Inspect processes of this node: the last `lines` lines of output and, for those marked in `stacks`, the Python stacks.

    In parallel: one after the other, many slow stack dumps would take minutes.
    """
    with ThreadPoolExecutor(max(len(locations), 1)) as pool:
        return list(pool.map(_inspect, locations, [lines] * len(locations), stacks))


def kill(locations: Sequence[ProcessLocation]) -> None:
    """Kill processes of this node, including stopped ones."""
    for location in dict.fromkeys(locations):  # roles may share a process
        if (process := _process(location)) is not None:
            process.send_signal(signal.SIGKILL)


def _process(location: ProcessLocation) -> psutil.Process | None:
    try:
        process = psutil.Process(location.pid)
        same = abs(process.create_time() - location.born) < 1.0
        return process if same and process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD) else None
    except psutil.NoSuchProcess:
        return None


def _inspect(location: ProcessLocation, lines: int, stack: bool) -> ProcessState:
    process, log = _process(location), "\n".join(_tail(path, lines) for path in location.logs)
    if process is None:
        return ProcessState("gone", log)
    stopped = process.status() == psutil.STATUS_STOPPED
    return ProcessState("stopped" if stopped else "running", log, _stack(location.pid) if stack else "")


def _stack(pid: int) -> str:
    program = str(Path(sys.executable).with_name("py-spy"))  # installed with Ray
    # --nonblocking: py-spy would wait forever for a stopped process to pause.
    command = [program, "dump", "--nonblocking", "--pid", str(pid)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except subprocess.TimeoutExpired:
        return "(py-spy did not finish within 20 s)"
    return done.stdout if done.returncode == 0 else f"(py-spy: {done.stderr.strip()[-300:]})"


def _tail(path: str, lines: int) -> str:
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.path.getsize(path) - 2**16))
            text = file.read().decode(errors="replace").splitlines()[-lines:]
    except OSError as error:
        return f"{os.path.basename(path)}: {error.strerror}"
    return "\n".join([f"{os.path.basename(path)}:", *(f"  {line}" for line in text)])
