"""A plugin whose workers die or stop at a given point.

Each file in the folder `faults` beside the run's folder, `<role>-<rank>.<point>.<count>.<signal>`, is a fault: the process
sends itself the signal when it reaches the point for the count-th time. It removes the file first, so that a fault happens
once. Signal 0 sends nothing: the point `loss` then makes the loss nan, and the point `export` raises.
"""

from __future__ import annotations

import signal
from pathlib import Path

from workers.process.worker_process import KINDS


def fault(runs: Path, who: str, point: str, count: int, number: int = signal.SIGKILL) -> None:
    """Write a fault for the runs in a folder."""
    folder = runs / "faults"
    folder.mkdir(exist_ok=True)
    (folder / f"{who}.{point}.{count}.{int(number)}").touch()


KINDS |= {
    "policy": "tests.support.dying_workers:DyingPolicy",
    "value": "tests.support.dying_workers:DyingValue",
    "rewards": "tests.support.dying_workers:DyingRewards",
    "rollout": "tests.support.dying_workers:DyingRollout",
}
