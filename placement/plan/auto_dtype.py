"""`model.dtype: auto`: bfloat16 where the device multiplies it faster than float32. Pure: no torch."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Literal

from configs.schema import RunConfig
from placement.cluster.spec import Cluster

Dtype = Literal["auto", "float32", "bfloat16"]
INSTRUCTIONS = ("amx_bf16", "avx512_bf16")
"""Of CPUs that multiply bfloat16, as /proc/cpuinfo names them."""


def undecided(config: RunConfig) -> list[str]:
    """The settings that are auto."""
    own = config.rm.model if config.rm else None
    asked = {"model.dtype": config.model.dtype, "rm.model.dtype": own.dtype if own else None}
    return [setting for setting, dtype in asked.items() if dtype == "auto"]


def with_dtype(config: RunConfig, dtype: Dtype, own: Dtype | None = None) -> RunConfig:
    """The settings with a type in place of each `auto`; own: that of `rm.model`, where it is another."""
    settings = undecided(config)
    if "model.dtype" in settings:
        config = config.model_copy(update={"model": config.model.model_copy(update={"dtype": dtype})})
    if "rm.model.dtype" in settings and config.rm and config.rm.model:
        model = config.rm.model.model_copy(update={"dtype": own or dtype})
        config = config.model_copy(update={"rm": config.rm.model_copy(update={"model": model})})
    return config


def on_gpu(config: RunConfig, cluster: Cluster) -> bool:
    return config.device == "cuda" or (config.device == "auto" and cluster.gpus > 0)


@cache
def instructions() -> str | None:
    """What this machine's CPU multiplies bfloat16 with, if anything."""
    info = Path("/proc/cpuinfo")
    flags = next((line for line in info.read_text().splitlines() if line.startswith("flags")), "").split()
    return next((name for name in INSTRUCTIONS if name in flags), None)


def foreseen(config: RunConfig, cluster: Cluster) -> Dtype:
    """What `auto` will become, but for the measurement that a run makes on a CPU; CPUs are taken to be like this machine's."""
    return "bfloat16" if on_gpu(config, cluster) or instructions() else "float32"
