"""The largest models that fit by prediction, beside the capacities that Colossal-AI published, with its benchmark's settings.

The benchmark: PPO on random prompts of 400 tokens, up to 512 tokens in total, four models of one size, 8 sequences in a pass of
experience making and of training, no gradient checkpointing, all on one GPU. Troupe has a fifth copy of the weights, in the
engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from configs.schema import RunConfig, Strategy
from placement.cluster.spec import Cluster
from placement.memory.estimate import MemoryEstimate, estimate_memory
from placement.memory.phases import CUDA_CONTEXT
from placement.models.activations import FLOAT32
from placement.models.architecture import LADDER, PRESET, Architecture
from placement.models.shapes import SIZES, read_shapes
from placement.plan.planner import make_plan
from placement.types import GIB

OPT_LADDER = tuple(f"facebook/opt-{size}" for size in ("125m", "350m", "1.3b", "2.7b", "6.7b", "13b", "30b", "66b"))
GPT_LADDER = tuple(PRESET + name for name in LADDER)

PROMPT, LENGTH = 400, 512


@dataclass(frozen=True)
class Published:
    """A published capacity: the largest model that trains on a machine, None where no model of the ladder does."""

    machine: str
    """In the form of `--cluster`."""
    strategy: Strategy
    dtype: Literal["float32", "bfloat16"]
    largest: str | None
    ladder: tuple[str, ...] = GPT_LADDER
    lora: bool = False
    rows: int = 8
    """Sequences in a pass."""


PUBLISHED = (
    Published("1x1xA100-80GB,host=1TB", "ddp", "float32", "preset:l"),
    Published("1x1xA100-40GB,host=256GB", "ddp", "float32", "preset:m"),
    Published("1x1xRTX3080-10GB,host=128GB", "ddp", "float32", None),
    Published("1x1xA100-80GB,host=1TB", "zero3_offload", "bfloat16", "preset:8b"),
    Published("1x1xA100-80GB,host=512GB", "zero3_offload", "bfloat16", "preset:6b"),
    Published("1x1xA100-40GB,host=256GB", "zero3_offload", "bfloat16", "preset:2b"),
    Published("1x1xRTX3080-10GB,host=128GB", "zero3_offload", "bfloat16", "preset:l", rows=1),
    Published("1x1xA100-40GB,host=256GB", "ddp", "float32", "facebook/opt-350m", OPT_LADDER),
    Published("1x1xA100-40GB,host=256GB", "ddp", "float32", "facebook/opt-1.3b", OPT_LADDER, lora=True),
    Published("1x1xRTX3080-10GB,host=128GB", "ddp", "float32", "facebook/opt-125m", OPT_LADDER),
    Published("1x1xRTX3080-10GB,host=128GB", "ddp", "float32", "facebook/opt-350m", OPT_LADDER, lora=True),
    Published("1x1xA100-80GB,host=512GB", "ddp", "float32", "facebook/opt-1.3b", OPT_LADDER),
    Published("1x1xA100-80GB,host=512GB", "ddp", "float32", "facebook/opt-2.7b", OPT_LADDER, lora=True),
)
"""Colossal-AI, February 2023. The last row was published as 3.5 billion parameters; no OPT has that size, so the next smaller one
is used."""


def largest_that_fits(case: Published, *, offload_idle: bool = False) -> str | None:
    """The largest model of the case's ladder that fits on its machine. offload_idle: roles free the GPU for one another, as in
    Troupe but not in the benchmark."""
    cluster = Cluster.parse(case.machine)
    best = None
    for model in case.ladder:
        estimate = benchmark_estimate(model, cluster, case, offload_idle=offload_idle)
        if estimate.missing or estimate.warnings:
            break
        best = model
    return best


def steps_apart(case: Published, largest: str | None) -> int:
    """Ladder steps from the published model to `largest`; None comes before the first model."""
    models: Sequence[str | None] = (None, *case.ladder)
    return models.index(largest) - models.index(case.largest)


def benchmark_estimate(model: str, cluster: Cluster, case: Published, *, offload_idle: bool) -> MemoryEstimate:
    """Predicted memory of the benchmark with a model, all roles on one GPU."""
    config = benchmark_config(model, cluster, case)
    plan, shapes = make_plan(config, "ppo", cluster), read_shapes(config, "ppo")
    return estimate_memory(config, plan, shapes, offload_idle=offload_idle)


def benchmark_config(model: str, cluster: Cluster, case: Published) -> RunConfig:
    """The benchmark's settings: no snapshots, and the largest pass is `case.rows` rows of 512 tokens."""
    settings = benchmark_settings(model, cluster, case.rows, case.dtype)
    if case.lora:
        settings["model"]["lora"] = {"rank": 16}
    return RunConfig.model_validate(settings | {"strategy": case.strategy})


def benchmark_settings(model: str, cluster: Cluster, rows: int = 8, dtype: str | None = None) -> dict[str, Any]:
    """The benchmark's settings for a model on all GPUs of a cluster in bfloat16, or on CPU in float32.

    All roles share the devices. Where the model is too large for the engine's share of a GPU, engines of several GPUs get a
    quarter of the nodes, or half of a single node, for themselves.
    """
    shape, gpus = Architecture.of(model), cluster.nodes[0].gpus
    dtype = dtype or ("bfloat16" if gpus else "float32")
    size = SIZES[dtype]
    share, devices, engine = engine_share(shape, size, rows, cluster) if gpus else 0.4, max(1, cluster.gpus), 1
    placement: dict[str, Any] = {"layout": "colocated", "devices": {"actor": devices}}
    if share > MAX_GPU_SHARE and cluster.gpus > 1:
        engine_gpus = gpus * (len(cluster.nodes) // 4) or gpus // 2
        devices, engine, share = cluster.gpus - engine_gpus, min(gpus, engine_gpus), MAX_GPU_SHARE
        placement = {
            "groups": [
                {"roles": ["actor", "critic", "reference", "reward"], "devices": devices},
                {"roles": ["rollout"], "devices": engine_gpus},
            ]
        }
    adam, data = {"lr": 1e-5}, {"path": "prompts.jsonl"}
    return {
        "name": "default",
        "model": {"path": model, "dtype": dtype},
        "ppo": {
            "prompts": data,
            "steps": 3,
            "prompts_per_step": 8 * rows * devices,
            "mini_batches": 8,
            "epochs": 3,
            "micro_batch_tokens": rows * LENGTH,
            "max_prompt_tokens": PROMPT,
            "rewards": [{"kind": "model", "path": model}],
            "actor_optimizer": adam,
            "critic_optimizer": adam,
        },
        "rollout": {
            "max_new_tokens": LENGTH - PROMPT,
            "max_sequences": rows,
            "gpu_memory_share": share,
            "tensor_parallel": engine,
        },
        "placement": placement,
        "recovery": {"snapshot_every": None},
    }


def default_settings_for(model: str, cluster: Cluster) -> dict[str, Any]:
    """`benchmark_settings` for a name of LADDER, a folder or a hub name. Raises ValueError for any other."""
    return benchmark_settings(PRESET + model if model in LADDER else model, cluster)


MAX_GPU_SHARE = 0.9
"""Largest share of a GPU for an engine: each other process needs memory for its CUDA context."""


def engine_share(shape: Architecture, size: int, sequences: int, cluster: Cluster) -> float:
    """The smallest `rollout.gpu_memory_share`, in hundredths, for the weights and `sequences` sequences."""
    gpu = min(node.gpu_memory_gb or 0.0 for node in cluster.nodes) * GIB
    each = LENGTH * shape.kv_bytes(size) + 2 * shape.vocabulary * FLOAT32
    needed = shape.parameters * size + sequences * each + CUDA_CONTEXT
    return min(1.0, -int(-100 * needed // gpu) / 100)


# ---------------------------------------------------------------- 175 billion


def large_config(cluster: Cluster) -> RunConfig:
    """InstructGPT's sizes: actor and reference of 175 billion parameters, critic and reward model of 6. Each pass has one
    sequence, and layers are recomputed in the backward pass."""
    settings = benchmark_settings("preset:175b", cluster, rows=1)
    settings["model"]["gradient_checkpointing"] = True
    settings["ppo"]["rewards"] = [{"kind": "model", "path": "preset:6b"}]
    return RunConfig.model_validate(settings | {"strategy": "zero3_offload"})


def large_estimate(nodes: int) -> MemoryEstimate:
    """Predicted memory of `large_config` on `nodes` nodes with 8 GPUs of 80 GB."""
    cluster = Cluster.parse(f"{nodes}x8xA100-80GB")
    config = large_config(cluster)
    return estimate_memory(config, make_plan(config, "ppo", cluster), read_shapes(config, "ppo"))
