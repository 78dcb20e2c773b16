"""What tests of runs share: a stage's numbers without the clock, models compared, commands."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

from orchestrator.metrics import read_metrics

ROOT = Path(__file__).parents[1]
VOLATILE = ("time", "tokens_per_second", "seconds/", "memory_gib/")


def lines(folder: Path, stage: str) -> list[dict[str, Any]]:
    """A stage's metrics without clock and memory."""
    return [
        {name: value for name, value in line.items() if not name.startswith(VOLATILE)}
        for line in read_metrics(folder)
        if line["stage"] == stage
    ]


def assert_same_model(a: Path, b: Path) -> None:
    """Bit for bit."""
    ours, theirs = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name].tobytes() != theirs[name].tobytes()] == []


def wait_for(condition: Callable[[], bool], seconds: float = 200) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not so within {seconds} s"
        time.sleep(0.02)


def command(*args: str) -> list[str]:
    """The command line of `troupe` with these arguments."""
    return [sys.executable, "-m", "orchestrator.cli", *args]
