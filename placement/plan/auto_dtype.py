"""`model.dtype: auto`: bfloat16 where the device multiplies it faster than float32. Imports no torch."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Literal

from configs.schema import RunConfig
from placement.cluster.spec import Cluster

Dtype = Literal["auto", "float32", "bfloat16"]
INSTRUCTIONS = ("amx_bf16", "avx512_bf16")
"""CPU instructions that multiply bfloat16, as named in /proc/cpuinfo."""


def auto_dtype_settings(config: RunConfig) -> list[str]:
    """Dotted paths of the dtype settings that are auto."""
    rm_model = config.rm.model if config.rm else None
    dtypes = {"model.dtype": config.model.dtype, "rm.model.dtype": rm_model.dtype if rm_model else None}
    return [setting for setting, dtype in dtypes.items() if dtype == "auto"]


def with_dtype(config: RunConfig, dtype: Dtype, rm_dtype: Dtype | None = None) -> RunConfig:
    """The settings with a type instead of each `auto`. rm_dtype: the type of `rm.model`; None: `dtype` too."""
    settings = auto_dtype_settings(config)
    if "model.dtype" in settings:
        config = config.model_copy(update={"model": config.model.model_copy(update={"dtype": dtype})})
    if "rm.model.dtype" in settings and config.rm and config.rm.model:
        model = config.rm.model.model_copy(update={"dtype": rm_dtype or dtype})
        config = config.model_copy(update={"rm": config.rm.model_copy(update={"model": model})})
    return config


def uses_gpu(config: RunConfig, cluster: Cluster) -> bool:
    return config.device == "cuda" or (config.device == "auto" and cluster.gpus > 0)


@cache
def bfloat16_instructions() -> str | None:
    """Name of this machine's CPU instructions for bfloat16; None where it has none."""
    info = Path("/proc/cpuinfo")
    flags = next((line for line in info.read_text().splitlines() if line.startswith("flags")), "").split()
    return next((name for name in INSTRUCTIONS if name in flags), None)


def predicted_dtype(config: RunConfig, cluster: Cluster) -> Dtype:
    """What `auto` will become, without the measurement that a run makes on a CPU. Assumes CPUs like this machine's."""
    return "bfloat16" if uses_gpu(config, cluster) or bfloat16_instructions() else "float32"
