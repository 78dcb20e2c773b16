"""`troupe bench --capacity`: the largest model of the ladder that runs on this machine within so much memory.

Each attempt is a `troupe bench` of two short steps (the second has the optimizer's states from its beginning), in a process of
its own that is watched. What passes the limit is ended whole: the process and all below it.
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

from orchestrator.bench.bench import Benchmark, configured
from orchestrator.bench.process_memory import Footprint
from orchestrator.run.run_dir import RunError
from placement.models import LADDER, Architecture
from workers.process.remote_error import headline_of_traceback

GIB = 2**30
UNITS = {"MIB": 2**20, "GIB": 2**30, "MB": 10**6, "GB": 10**9}
SHORT = ("--num_episodes=2", "--max_timesteps=1", "--update_timesteps=1", "--max_epochs=1")
AVAILABLE = 0.95
"""Share of the memory that is available now, where no limit is given."""


@dataclass(frozen=True)
class Attempt:
    """One size under one strategy."""

    model: str
    parameters: int
    peak: int
    """Bytes of all processes together, as far as it came."""
    failure: str = ""
    passed: bool = False
    """Whether it passed the limit."""


def memory_of(text: str) -> int:
    """Bytes that a text such as 16GiB stands for. Raises RunError."""
    if (found := re.fullmatch(r"(\d+(?:\.\d+)?) ?([MG]i?B)", text, re.IGNORECASE)) and found[2].upper() in UNITS:
        return int(float(found[1]) * UNITS[found[2].upper()])
    raise RunError(f"--memory: was {text!r}; must be a size such as 16GiB or 500MiB")


def ways(asked: Benchmark, overrides: Sequence[str]) -> dict[str, list[str]]:
    """Name -> flags of `troupe bench`: ddp in float32 without adapters, and then each strategy asked for (commas between).

    Raises ConfigError or RunError where one of them could not run, whatever the model's size.
    """
    for strategy in asked.strategy.split(","):
        with tempfile.TemporaryDirectory() as folder:
            configured(replace(asked, strategy=strategy), overrides, Path(folder))
    common = [
        f"--experience_batch_size={asked.experience_batch_size}",
        f"--train_batch_size={asked.train_batch_size}",
        f"--layout={asked.layout}",
        f"--devices={asked.devices}",
        f"--lengths={asked.prompt},{asked.total}",
        *overrides,
    ]
    found = {"ddp float32": ["--strategy=ddp", "--precision=float32", *common]}
    for strategy in asked.strategy.split(","):
        flags = [f"--strategy={strategy}", f"--precision={asked.precision}", *common]
        name = f"{strategy} {asked.precision}"
        if asked.lora_rank:
            flags.append(f"--lora-rank={asked.lora_rank}")
            name += f" LoRA {asked.lora_rank}"
        if asked.share:
            flags.append(f"--share={','.join(asked.share)}")
            name += " shared"
        found.setdefault(name, flags)
    return found


def capacity(asked: dict[str, list[str]], limit: int | None, console: Console) -> dict[str, Any]:
    """The largest model of each way (name -> flags of `troupe bench`), beside that of the first."""
    limit = limit or int(AVAILABLE * psutil.virtual_memory().available)
    console.print(f"at most {limit / GIB:.2f} GiB, proportional set size of all processes together")
    found: dict[str, Any] = {"limit_bytes": limit, "ways": {}}
    first: Attempt | None = None
    for number, (name, flags) in enumerate(asked.items()):
        tries = list(_climb(name, flags, limit, console))
        largest = max((t for t in tries if not t.failure), key=lambda t: t.parameters, default=None)
        first = largest if number == 0 else first
        ratio = largest.parameters / first.parameters if largest and first else None
        found["ways"][name] = {
            "largest": largest.model if largest else None,
            "parameters": largest.parameters if largest else 0,
            "ratio": ratio,
            "attempts": [vars(t) for t in tries],
        }
        said = f"{largest.model}, {largest.parameters:,} parameters" if largest else "no model of the ladder runs"
        beside = f", {ratio:.2f} times that of {next(iter(asked))}" if ratio and number else ""
        console.print(f"{name}: {said}{beside}", style="bold")
    return found


def _climb(name: str, flags: Sequence[str], limit: int, console: Console) -> Iterator[Attempt]:
    """From the smallest up to the first that passes the limit. One that fails for another reason is told and left out."""
    size = 2 if "--precision=bfloat16" in flags else 4
    for model in sorted(LADDER, key=lambda m: Architecture.preset(m).parameters):
        shape = Architecture.preset(model)
        if shape.parameters * size > limit:
            console.print(f"  {name}, {model}: its weights alone take {shape.parameters * size / GIB:.2f} GiB")
            return
        attempt = _attempt(model, shape.parameters, flags, limit)
        console.print(f"  {name}, {model}: {attempt.failure or 'runs'}, {attempt.peak / GIB:.2f} GiB", soft_wrap=True)
        yield attempt
        if attempt.passed:
            return


def _attempt(model: str, parameters: int, flags: Sequence[str], limit: int) -> Attempt:
    # Short, since Ray's sockets lie below it.
    with tempfile.TemporaryDirectory(prefix="troupe-") as folder, open(Path(folder) / "log", "w+b") as log:
        command = [sys.executable, "-m", "troupe", "bench", f"--model={model}"]
        process = subprocess.Popen(
            [*command, *SHORT, *flags],
            stdout=log,
            stderr=log,
            env={**os.environ, "TMPDIR": folder, "RAY_ADDRESS": ""},  # on a cluster of its own, which ends with it
            start_new_session=True,
        )
        try:
            with Footprint(process.pid, limit=limit) as footprint:
                _until(process, footprint.passed)
        finally:
            end_whole(process)
        if footprint.passed.is_set():
            return Attempt(model, parameters, footprint.total, "passes the limit", passed=True)
        if process.returncode:
            return Attempt(model, parameters, footprint.total, f"fails: {failure_of(log)}")
        return Attempt(model, parameters, footprint.total)


def _until(process: subprocess.Popen[bytes], passed: threading.Event) -> None:
    while process.poll() is None and not passed.wait(0.1):
        pass


def end_whole(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and all below it, and wait until they are gone."""
    if process.poll() is None:
        with suppress(psutil.NoSuchProcess):
            below = psutil.Process(process.pid).children(recursive=True)
            process.kill()
            for each in below:
                with suppress(psutil.NoSuchProcess):
                    each.kill()
            psutil.wait_procs(below, timeout=30)
    process.wait()


def failure_of(log: IO[bytes]) -> str:
    """What the command said of its failure, in one line, else the exception that its traceback ends with, or its last line."""
    log.seek(0)
    text = log.read().decode(errors="replace")
    lines = [line for line in text.splitlines() if line.strip()]
    said = [k for k, line in enumerate(lines) if line.startswith("troupe: ")]
    if not said:
        return headline_of_traceback(text) or (lines[-1] if lines else "without a word")
    first, *others = lines[said[-1] :]
    details = "; ".join(line.strip() for line in takewhile(lambda line: line.startswith("  "), others))
    return f"{first.removeprefix('troupe: ')} {details}".strip()
