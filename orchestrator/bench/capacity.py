"""`troupe bench --capacity`: the largest preset model that runs on this machine within a memory limit.

Each attempt is a `troupe bench` of two short steps (the second starts with the optimizer's states) in a monitored subprocess. An
attempt that exceeds the limit is killed with all its child processes.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import IO, Any

import psutil
from rich.console import Console

from orchestrator.bench.bench import Benchmark, make_config
from orchestrator.bench.process_memory import MemoryMonitor
from orchestrator.run import RunError
from placement.models import LADDER, Architecture
from workers.process.remote_error import headline_of_traceback

GIB = 2**30
UNITS = {"MIB": 2**20, "GIB": 2**30, "MB": 10**6, "GB": 10**9}
SHORT = ("--num_episodes=2", "--max_timesteps=1", "--update_timesteps=1", "--max_epochs=1")
DEFAULT_SHARE = 0.95
"""Share of the available memory that is the limit if none is given."""


@dataclass(frozen=True)
class Attempt:
    """One model size with one strategy."""

    model: str
    parameters: int
    peak: int
    """Bytes of all processes together, until the attempt ended."""
    failure: str = ""
    passed: bool = False
    """Whether it exceeded the limit."""


def memory_of(text: str) -> int:
    """Bytes of a size such as 16GiB. Raises RunError."""
    if (match := re.fullmatch(r"(\d+(?:\.\d+)?) ?([MG]i?B)", text, re.IGNORECASE)) and match[2].upper() in UNITS:
        return int(float(match[1]) * UNITS[match[2].upper()])
    raise RunError(f"--memory: was {text!r}; must be a size, for example 16GiB or 500MiB")


def variants(benchmark: Benchmark, overrides: Sequence[str]) -> dict[str, list[str]]:
    """Name -> flags of `troupe bench`: ddp in float32 without adapters, then each requested strategy (comma-separated).

    Raises ConfigError or RunError if one of them cannot run with any model size.
    """
    for strategy in benchmark.strategy.split(","):
        with tempfile.TemporaryDirectory() as folder:
            make_config(replace(benchmark, strategy=strategy), overrides, Path(folder))
    common = [
        f"--experience_batch_size={benchmark.experience_batch_size}",
        f"--train_batch_size={benchmark.train_batch_size}",
        f"--layout={benchmark.layout}",
        f"--devices={benchmark.devices}",
        f"--lengths={benchmark.prompt},{benchmark.total}",
        *overrides,
    ]
    flags_by_name = {"ddp float32": ["--strategy=ddp", "--precision=float32", *common]}
    for strategy in benchmark.strategy.split(","):
        flags = [f"--strategy={strategy}", f"--precision={benchmark.precision}", *common]
        name = f"{strategy} {benchmark.precision}"
        if benchmark.lora_rank:
            flags.append(f"--lora-rank={benchmark.lora_rank}")
            name += f" LoRA {benchmark.lora_rank}"
        if benchmark.share:
            flags.append(f"--share={','.join(benchmark.share)}")
            name += " shared"
        flags_by_name.setdefault(name, flags)
    return flags_by_name


def search_capacity(flags_by_name: dict[str, list[str]], limit: int | None, console: Console) -> dict[str, Any]:
    """The largest model of each variant (name -> flags of `troupe bench`), and its ratio to that of the first variant."""
    limit = limit or int(DEFAULT_SHARE * psutil.virtual_memory().available)
    console.print(f"limit: {limit / GIB:.2f} GiB of proportional set size over all processes")
    result: dict[str, Any] = {"limit_bytes": limit, "ways": {}}
    first: Attempt | None = None
    for number, (name, flags) in enumerate(flags_by_name.items()):
        attempts = list(_attempts(name, flags, limit, console))
        largest = max(
            (attempt for attempt in attempts if not attempt.failure),
            key=lambda attempt: attempt.parameters,
            default=None,
        )
        first = largest if number == 0 else first
        ratio = largest.parameters / first.parameters if largest and first else None
        result["ways"][name] = {
            "largest": largest.model if largest else None,
            "parameters": largest.parameters if largest else 0,
            "ratio": ratio,
            "attempts": [vars(attempt) for attempt in attempts],
        }
        size = f"{largest.model}, {largest.parameters:,} parameters" if largest else "no preset model runs"
        comparison = f", {ratio:.2f} times that of {next(iter(flags_by_name))}" if ratio and number else ""
        console.print(f"{name}: {size}{comparison}", style="bold")
    return result


def _attempts(name: str, flags: Sequence[str], limit: int, console: Console) -> Iterator[Attempt]:
    """Attempts with growing sizes, up to the first that exceeds the limit. Other failures are printed and skipped."""
    size = 2 if "--precision=bfloat16" in flags else 4
    for model in sorted(LADDER, key=lambda m: Architecture.preset(m).parameters):
        shape = Architecture.preset(model)
        if shape.parameters * size > limit:
            console.print(f"  {name}, {model}: the weights alone take {shape.parameters * size / GIB:.2f} GiB")
            return
        attempt = _attempt(model, shape.parameters, flags, limit)
        console.print(f"  {name}, {model}: {attempt.failure or 'runs'}, {attempt.peak / GIB:.2f} GiB", soft_wrap=True)
        yield attempt
        if attempt.passed:
            return


def _attempt(model: str, parameters: int, flags: Sequence[str], limit: int) -> Attempt:
    # A short path, because the paths of Ray's sockets in it are limited.
    with tempfile.TemporaryDirectory(prefix="troupe-") as folder, open(Path(folder) / "log", "w+b") as log:
        command = [sys.executable, "-m", "troupe", "bench", f"--model={model}"]
        process = subprocess.Popen(
            [*command, *SHORT, *flags],
            stdout=log,
            stderr=log,
            env={**os.environ, "TMPDIR": folder, "RAY_ADDRESS": ""},  # on its own cluster, which ends with it
            start_new_session=True,
        )
        try:
            with MemoryMonitor(process.pid, limit=limit) as monitor:
                _wait(process, monitor.over_limit)
        finally:
            kill_tree(process)
        if monitor.over_limit.is_set():
            return Attempt(model, parameters, monitor.total, "exceeds the limit", passed=True)
        if process.returncode:
            return Attempt(model, parameters, monitor.total, f"fails: {failure_of(log)}")
        return Attempt(model, parameters, monitor.total)


def _wait(process: subprocess.Popen[bytes], over_limit: threading.Event) -> None:
    while process.poll() is None and not over_limit.wait(0.1):
        pass


def kill_tree(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and all its descendants, and wait until they have ended."""
    if process.poll() is None:
        with suppress(psutil.NoSuchProcess):
            descendants = psutil.Process(process.pid).children(recursive=True)
            process.kill()
            for descendant in descendants:
                with suppress(psutil.NoSuchProcess):
                    descendant.kill()
            psutil.wait_procs(descendants, timeout=30)
    process.wait()


def failure_of(log: IO[bytes]) -> str:
    """The command's error message in one line, or else the exception at the end of its traceback, or its last line."""
    log.seek(0)
    text = log.read().decode(errors="replace")
    lines = [line for line in text.splitlines() if line.strip()]
    messages = [k for k, line in enumerate(lines) if line.startswith("troupe: ")]
    if not messages:
        return headline_of_traceback(text) or (lines[-1] if lines else "no output")
    first, *others = lines[messages[-1] :]
    details = "; ".join(line.strip() for line in takewhile(lambda line: line.startswith("  "), others))
    return f"{first.removeprefix('troupe: ')} {details}".strip()
