"""The largest models that fit, by the plan: what Colossal-AI published of its benchmark, with the benchmark's own settings.

PPO on random prompts of 400 tokens, up to 512 in all, four models of one size, 8 sequences in a pass of experience making and of
training, no gradient checkpointing, all on one GPU. Ours has a fifth copy of the weights, the engine's.
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
    """A capacity that was published: the largest model that trains on a machine; none where none of the ladder does."""

    machine: str
    """As in `--cluster`."""
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
"""Colossal-AI, February 2023. The paper numbers of OPT's last row, 3.5 billion, are no OPT: the next smaller one stands here."""


def largest_that_fits(case: Published, *, turns: bool = False) -> str | None:
    """The largest model of the case's ladder that fits on its machine. turns: roles leave the GPU to one another, as they do in
    Troupe and did not in the benchmark."""
    cluster = Cluster.parse(case.machine)
    best = None
    for model in case.ladder:
        found = benchmark_forecast(model, cluster, case, turns=turns)
        if found.missing or found.warnings:
            break
        best = model
    return best


def steps_apart(case: Published, found: str | None) -> int:
    """Rungs of the ladder between what was found and what was published; none of the ladder is below its first."""
    rungs: Sequence[str | None] = (None, *case.ladder)
    return rungs.index(found) - rungs.index(case.largest)


def benchmark_forecast(model: str, cluster: Cluster, case: Published, *, turns: bool) -> MemoryEstimate:
    """Predicted memory of the benchmark with a model, all roles on one GPU."""
    config = benchmark_config(model, cluster, case)
    return estimate_memory(config, make_plan(config, "ppo", cluster), read_shapes(config, "ppo"), turns=turns)


def benchmark_config(model: str, cluster: Cluster, case: Published) -> RunConfig:
    """A run's settings as the benchmark had them: no snapshots, and the largest pass is `case.rows` rows of 512 tokens."""
    settings = supposed(model, cluster, case.rows, case.dtype)
    if case.lora:
        settings["model"]["lora"] = {"rank": 16}
    return RunConfig.model_validate(settings | {"strategy": case.strategy})


def supposed(model: str, cluster: Cluster, rows: int = 8, dtype: str | None = None) -> dict[str, Any]:
    """Settings of a run that nobody wrote: the benchmark's, on all GPUs of a cluster in bfloat16, or on a CPU of it.

    All roles share the devices. Where the model is too large for the engine's part of a GPU, engines of several GPUs have
    every fourth of the nodes, or the half of a single node, for themselves.
    """
    shape, gpus = Architecture.of(model), cluster.nodes[0].gpus
    dtype = dtype or ("bfloat16" if gpus else "float32")
    size = SIZES[dtype]
    share, devices, engine = engine_share(shape, size, rows, cluster) if gpus else 0.4, max(1, cluster.gpus), 1
    placement: dict[str, Any] = {"layout": "colocated", "devices": {"actor": devices}}
    if share > MOST_OF_A_GPU and cluster.gpus > 1:
        serving = gpus * (len(cluster.nodes) // 4) or gpus // 2
        devices, engine, share = cluster.gpus - serving, min(gpus, serving), MOST_OF_A_GPU
        placement = {
            "groups": [
                {"roles": ["actor", "critic", "reference", "reward"], "devices": devices},
                {"roles": ["rollout"], "devices": serving},
            ]
        }
    adam, data = {"lr": 1e-5}, {"path": "prompts.jsonl"}
    return {
        "name": "supposed",
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
    """`supposed` of a name of the ladder, a folder or a hub name. Raises ValueError for another."""
    return supposed(PRESET + model if model in LADDER else model, cluster)


MOST_OF_A_GPU = 0.9
"""Share of a GPU that an engine may have at most: the other processes need a context each."""


def engine_share(shape: Architecture, size: int, sequences: int, cluster: Cluster) -> float:
    """The least `rollout.gpu_memory_share`, in hundredths, that holds the weights and what so many sequences take."""
    gpu = min(node.gpu_memory_gb or 0.0 for node in cluster.nodes) * GIB
    each = LENGTH * shape.kv_bytes(size) + 2 * shape.vocabulary * FLOAT32
    needed = shape.parameters * size + sequences * each + CUDA_CONTEXT
    return min(1.0, -int(-100 * needed // gpu) / 100)


# ---------------------------------------------------------------- 175 billion


def large_config(cluster: Cluster) -> RunConfig:
    """InstructGPT's sizes: actor and reference of 175 billion parameters, critic and reward model of 6. Each pass takes one
    sequence, and layers are computed again in the backward pass."""
    settings = supposed("preset:175b", cluster, rows=1)
    settings["model"]["gradient_checkpointing"] = True
    settings["ppo"]["rewards"] = [{"kind": "model", "path": "preset:6b"}]
    return RunConfig.model_validate(settings | {"strategy": "zero3_offload"})


def large_forecast(nodes: int) -> MemoryEstimate:
    """Predicted memory of `large_config` on as many nodes of 8 GPUs of 80 GB."""
    cluster = Cluster.parse(f"{nodes}x8xA100-80GB")
    config = large_config(cluster)
    return estimate_memory(config, make_plan(config, "ppo", cluster), read_shapes(config, "ppo"))
