"""What `model.dtype: auto` becomes for a run: on a GPU bfloat16, on a CPU what multiplies faster, by a short measurement."""

from __future__ import annotations

import time
from typing import NamedTuple

import ray

from configs import RunConfig
from placement import Cluster
from placement.plan import Dtype, auto_dtype_settings, bfloat16_instructions, uses_gpu, with_dtype

FASTER = 1.2
"""bfloat16 is taken where it multiplies at least so many times as fast: its rounding is to be worth it."""
ROWS, INPUTS, OUTPUTS = 512, 576, 1536
"""Shape of the products that are measured: a layer of a small model."""
ROUNDS = 10


class Choice(NamedTuple):
    dtype: Dtype
    why: str


def with_chosen_dtype(config: RunConfig, cluster: Cluster) -> tuple[RunConfig, str | None]:
    """The settings with the type that suits the cluster, to which this process is connected, in place of each `auto`, and why it
    does; None where no type is to be chosen."""
    if not auto_dtype_settings(config):
        return config, None
    if uses_gpu(config, cluster):
        found = Choice("bfloat16", "on GPUs")
    elif config.cluster.address:  # its CPUs may be others than this machine's
        found = ray.get(ray.remote(measured).remote())
    else:
        found = measured()
    return with_dtype(config, found.dtype), found.why


def measured() -> Choice:
    """What this machine's CPU multiplies faster."""
    found = bfloat16_instructions()
    if found is None:
        return Choice("float32", "the CPU has no instructions for products in bfloat16")
    ratio = _ratio()
    dtype: Dtype = "bfloat16" if ratio >= FASTER else "float32"
    return Choice(dtype, f"by {found} products in bfloat16 take 1/{ratio:.1f} of their time in float32")


def _ratio() -> float:
    """Times as fast as in float32."""
    import torch  # half a second, which a GPU run's driver can do without

    pairs = [
        (torch.ones(ROWS, INPUTS, dtype=dtype), torch.ones(INPUTS, OUTPUTS, dtype=dtype))
        for dtype in (torch.float32, torch.bfloat16)
    ]
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(ROUNDS):
        for taken, (a, b) in zip(seconds, pairs, strict=True):
            started = time.perf_counter()
            torch.mm(a, b)
            taken.append(time.perf_counter() - started)
    return min(seconds[0]) / min(seconds[1])
