"""The largest models that fit, by the plan: what Colossal-AI published of its benchmark, with the benchmark's own settings.

PPO on random prompts of 400 tokens, up to 512 in all, four models of one size, 8 sequences in a pass of experience making and of
training, no gradient checkpointing, all on one GPU. Ours has a fifth copy of the weights, the engine's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from configs.schema import RunConfig, Strategy
from placement.activations import FLOAT32
from placement.architecture import LADDER, PRESET, Architecture
from placement.cluster import Cluster
from placement.forecast import Forecast, forecast, read_shapes
from placement.phases import CUDA_CONTEXT
from placement.places import GIB
from placement.plan import make_plan

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


def benchmark_forecast(model: str, cluster: Cluster, case: Published, *, turns: bool) -> Forecast:
    """Predicted memory of the benchmark with a model, all roles on one GPU."""
    config = benchmark_config(model, cluster, case)
    return forecast(config, make_plan(config, "ppo", cluster), read_shapes(config, "ppo"), turns=turns)


def benchmark_config(model: str, cluster: Cluster, case: Published) -> RunConfig:
    """A run's settings as the benchmark had them: no snapshots, and the largest pass is `case.rows` rows of 512 tokens."""
    adam, data = {"lr": 1e-5}, {"path": "prompts.jsonl"}
    share = engine_share(Architecture.of(model), 4 if case.dtype == "float32" else 2, case.rows, cluster)
    return RunConfig.model_validate(
        {
            "name": "benchmark",
            "strategy": case.strategy,
            "model": {"path": model, "dtype": case.dtype} | ({"lora": {"rank": 16}} if case.lora else {}),
            "ppo": {
                "prompts": data,
                "steps": 3,
                "prompts_per_step": 8 * case.rows,
                "mini_batches": 8,
                "epochs": 3,
                "micro_batch_tokens": case.rows * LENGTH,
                "max_prompt_tokens": PROMPT,
                "actor_optimizer": adam,
                "critic_optimizer": adam,
            },
            "rm": {"train": data, "optimizer": adam},
            "rollout": {
                "max_new_tokens": LENGTH - PROMPT,
                "max_sequences": case.rows,
                "gpu_memory_share": share,
            },
            "placement": {"layout": "colocated"},
            "recovery": {"snapshot_every": None},
        }
    )


def engine_share(shape: Architecture, size: int, sequences: int, cluster: Cluster) -> float:
    """The least `rollout.gpu_memory_share`, in hundredths, that holds the weights and what so many sequences take."""
    gpu = min(node.gpu_memory_gb or 0.0 for node in cluster.nodes) * GIB
    each = LENGTH * shape.kv_bytes(size) + 2 * shape.vocabulary * FLOAT32
    needed = shape.parameters * size + sequences * each + CUDA_CONTEXT
    return min(1.0, -int(-100 * needed // gpu) / 100)


# ---------------------------------------------------------------- 175 billion


def large_config(nodes: int) -> RunConfig:
    """InstructGPT's sizes on nodes of 8 GPUs: actor and reference of 175 billion parameters, critic and reward model of 6, on
    three quarters of them; each engine on a node of its own. Every pass takes one sequence."""
    adam, data = {"lr": 1e-5}, {"path": "prompts.jsonl"}
    engines = nodes // 4
    training = 8 * (nodes - engines)
    return RunConfig.model_validate(
        {
            "name": "large",
            "strategy": "zero3_offload",
            "model": {"path": "preset:175b", "dtype": "bfloat16", "gradient_checkpointing": True},
            "ppo": {
                "prompts": data,
                "steps": 3,
                "prompts_per_step": training,
                "micro_batch_tokens": LENGTH,
                "max_prompt_tokens": PROMPT,
                "actor_optimizer": adam,
                "critic_optimizer": adam,
            },
            "rm": {"model": {"path": "preset:6b", "dtype": "bfloat16"}, "train": data, "optimizer": adam},
            "rollout": {
                "max_new_tokens": LENGTH - PROMPT,
                "max_sequences": 64,
                "tensor_parallel": 8,
                "gpu_memory_share": 0.9,
            },
            "placement": {
                "groups": [
                    {"roles": ["actor", "critic", "reference", "reward"], "devices": training},
                    {"roles": ["rollout"], "devices": 8 * engines},
                ]
            },
            "recovery": {"snapshot_every": None},
        }
    )


def large_forecast(nodes: int) -> Forecast:
    """Predicted memory of `large_config` on as many nodes of 8 GPUs of 80 GB."""
    config = large_config(nodes)
    plan = make_plan(config, "ppo", Cluster.parse(f"{nodes}x8xA100-80GB"))
    return forecast(config, plan, read_shapes(config, "ppo"))
