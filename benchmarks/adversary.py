"""A plugin for benchmarks/chaos.py: an actor whose transfer of weights can be damaged on the way, once, when told to."""

from __future__ import annotations

from pathlib import Path

from configs.schema import RunConfig
from workers.process.worker_process import KINDS


def damage_mark(config: RunConfig) -> Path:
    """While this file is there, the next bucket of weights gets a flipped bit; then it is removed."""
    return Path(config.runs) / f"{config.name}.damage"


KINDS["policy"] = "benchmarks.damaging:DamagingPolicy"
