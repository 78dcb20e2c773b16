"""A plugin for benchmarks/chaos.py: an actor that damages one weight transfer on request."""

from __future__ import annotations

from pathlib import Path

from configs.schema import RunConfig
from workers.process.worker_process import KINDS


def damage_mark(config: RunConfig) -> Path:
    """If this file exists, the next bucket of weights gets a flipped bit, and the file is removed."""
    return Path(config.runs) / f"{config.name}.damage"


KINDS["policy"] = "benchmarks.damaging:DamagingPolicy"
