"""Resolves `model.dtype: auto`: bfloat16 on GPUs; on CPUs the dtype whose products are faster, by a short measurement."""

from __future__ import annotations

import time
from typing import NamedTuple

import ray

from configs import RunConfig
from placement import Cluster
from placement.plan import Dtype, auto_dtype_settings, bfloat16_instructions, uses_gpu, with_dtype

MIN_SPEEDUP = 1.2
"""Least speedup over float32 for which bfloat16 is chosen, since it rounds more."""
ROWS, INPUTS, OUTPUTS = 512, 576, 1536
"""Shape of the measured products: a layer of a small model."""
ROUNDS = 10


class Choice(NamedTuple):
    dtype: Dtype
    why: str


def with_chosen_dtype(config: RunConfig, cluster: Cluster) -> tuple[RunConfig, str | None]:
    """The settings with a dtype instead of each `auto`, for the cluster that this process is connected to; and the reason, None
    if there was no `auto`."""
    if not auto_dtype_settings(config):
        return config, None
    if uses_gpu(config, cluster):
        choice = Choice("bfloat16", "on GPUs")
    elif config.cluster.address:  # its CPUs may differ from this machine's
        choice = ray.get(ray.remote(measured).remote())
    else:
        choice = measured()
    return with_dtype(config, choice.dtype), choice.why


def measured() -> Choice:
    """The dtype whose products are faster on this machine's CPU."""
    instruction_set = bfloat16_instructions()
    if instruction_set is None:
        return Choice("float32", "the CPU has no bfloat16 instructions")
    speedup = _speedup()
    dtype: Dtype = "bfloat16" if speedup >= MIN_SPEEDUP else "float32"
    return Choice(dtype, f"with {instruction_set}, products in bfloat16 are {speedup:.1f} times as fast as in float32")


def _speedup() -> float:
    """Time of a product in float32 / in bfloat16."""
    import torch  # takes half a second, which a GPU run's driver saves

    pairs = [
        (torch.ones(ROWS, INPUTS, dtype=dtype), torch.ones(INPUTS, OUTPUTS, dtype=dtype))
        for dtype in (torch.float32, torch.bfloat16)
    ]
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(ROUNDS):
        for times, (a, b) in zip(seconds, pairs, strict=True):
            started = time.perf_counter()
            torch.mm(a, b)
            times.append(time.perf_counter() - started)
    return min(seconds[0]) / min(seconds[1])
