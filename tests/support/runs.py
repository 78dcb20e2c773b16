"""Helpers for tests of runs: comparing models, command lines, a run with some stages not started."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from safetensors.numpy import load_file

from orchestrator import Result
from orchestrator.preflight.settings_checks import settings_checks
from orchestrator.run.run_dir import Run
from orchestrator.storage.metrics_file import read_metrics
from placement.types import Stage

ROOT = Path(__file__).parents[2]
TWO_ENGINES = "placement.devices.rollout=2"


def check(run: Run, stages: Sequence[Stage]) -> None:
    """Run all checks of a run's settings; raises the first error."""
    for settings_check in settings_checks(run, stages):
        settings_check()


def assert_same_model(a: Path, b: Path) -> None:
    """Equal bit for bit."""
    first, second = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    assert first.keys() == second.keys()
    assert [name for name in first if first[name].tobytes() != second[name].tobytes()] == []


def flip_bit(path: Path, at: int = 0) -> None:
    """Change one bit of a file."""
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def wait_for(condition: Callable[[], bool], seconds: float = 200) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"condition not met within {seconds} s"
        time.sleep(0.02)


def command(*args: str) -> list[str]:
    """The command line of `troupe` with these arguments."""
    return [sys.executable, "-m", "orchestrator.cli", *args]


def begun(whole: Result, folder: Path, without: tuple[str, ...]) -> Path:
    """A copy of a finished run in which some stages have not started; returns its folder."""
    copy = folder / whole.folder.name
    shutil.copytree(whole.folder, copy, symlinks=True)
    for stage in without:
        shutil.rmtree(copy / "models" / stage)
    kept = [line for line in read_metrics(copy) if line["stage"] not in without]
    (copy / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    shutil.rmtree(copy / "evaluation")
    return copy
