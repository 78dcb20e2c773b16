"""The Ray actor around a worker: it imports the worker's class in its own process, so that the driver never imports torch."""

from __future__ import annotations

import ctypes
import sys
from contextlib import nullcontext
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from workers.worker import WorkerSpec

KINDS = {
    "policy": "workers.policy:PolicyWorker",
    "value": "workers.value:ValueWorker",
    "rewards": "workers.rewards:RewardWorker",
    "rollout": "workers.rollout:RolloutWorker",
}


class Host:
    """One worker, known in Ray's dashboard by its role and rank."""

    def __init__(self, kind: str, spec: WorkerSpec) -> None:
        if spec.device == "cpu":
            # A compiler for GPUs, which torch would load where it is installed: 70 MB for nothing.
            sys.modules["triton"] = None  # type: ignore[assignment]
        for plugin in spec.config.plugins:
            import_module(plugin)
        module, _, name = KINDS[kind].partition(":")
        self.spec = spec
        self.worker = getattr(import_module(module), name)(spec)
        self.turns = import_module("workers.turns").Turns([self.worker], spec.device) if spec.by_turns else None

    def __repr__(self) -> str:
        return f"{self.spec.role}-{self.spec.rank}"

    def call(self, method: str, *args: Any) -> Any:
        try:
            with self.turns.turn(method) if self.turns else nullcontext():
                return getattr(self.worker, method)(*args)
        finally:
            _give_memory_back()


def _give_memory_back() -> None:
    """What was freed goes back to the system, for the roles whose turn comes: by itself the C library keeps it."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):  # glibc
        libc.malloc_trim(0)
