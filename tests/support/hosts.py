"""Worker groups without a team, on the tests' cluster, with one thread per worker. Tests load tiny models into them in turn."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from configs.schema import (
    DeadlineSettings,
    LoraSettings,
    ModelSettings,
    OptimizerSettings,
    Role,
    RunConfig,
    Strategy,
)
from orchestrator.worker_groups.calls import WorkerGroup
from orchestrator.worker_groups.deadlines import Deadlines
from tests.support.apis import OpenApi
from tests.support.models import encoded
from workers.api import PolicyApi, RolloutApi, TrainerApi, WorkerApi, request
from workers.data import Row, RowKind
from workers.data.samples import RolloutBatch, SampleRefs
from workers.data.step_inputs import SupervisedBatch
from workers.process.worker import WorkerSpec, environment
from workers.process.worker_process import WorkerProcess
from workers.training.schedule import StageStep

DEADLINES = Deadlines(DeadlineSettings(initial_timeout=240.0, start=240.0))


def run_config(**settings: Any) -> RunConfig:
    """Settings of a small PPO run."""
    data, adam = {"path": "rows.jsonl"}, {"lr": 0.03}
    ppo = {"prompts": data, "steps": 1, "actor_optimizer": adam, "critic_optimizer": adam}
    rollout = {"max_new_tokens": 24, "kv_cache_gib": 0.1, "max_sequences": 16, "temperature": 0.8}
    base = {"name": "tests", "model": {"path": "model", "dtype": "float32"}, "ppo": ppo, "rollout": rollout}
    base["rm"] = {"train": data, "optimizer": adam}
    return RunConfig.model_validate(base | settings)


class Hosts:
    """Groups by kind and size, each started at its first use. A trainer changes its strategy at its next `load`, so that one
    process serves many tests: starting it takes longer than most tests."""

    def __init__(self) -> None:
        self.groups: dict[tuple[str, int, bool, str], WorkerGroup] = {}

    def group(
        self,
        kind: str,
        role: Role,
        strategy: Strategy = "ddp",
        ranks: int = 1,
        another: bool = False,
        served: LoraSettings | None = None,
    ) -> WorkerGroup:
        """another: a second group of the same kind. served: an adapter that is sent to engines without the base."""
        key = (kind, ranks, another, served.model_dump_json() if served else "")
        if key not in self.groups:
            plugin = "tests.support.learners" if kind.startswith("open") else "tests.support.faults"
            model = {"path": "model", "dtype": "float32", "lora": served}
            config = run_config(plugins=[plugin], model=model, weight_sync={"lora": "adapter" if served else "merged"})
            env = {"env_vars": environment(config, role, "cpu", 1)}
            specs = [WorkerSpec(config, role, rank, ranks, "cpu", 1) for rank in range(ranks)]
            handles = [
                ray.remote(WorkerProcess).options(num_cpus=1, runtime_env=env).remote([(kind, spec)]) for spec in specs
            ]
            self.groups[key] = WorkerGroup(role, handles, " ".join(map(str, key)), DEADLINES)
            self.groups[key].call(WorkerApi.join, self.groups[key].first(WorkerApi.address)).get()
        if role != "rollout":
            self.groups[key].call(OpenApi.become, strategy, {}).get()
        return self.groups[key]

    def stop(self) -> None:
        for group in self.groups.values():
            for handle in group.handles:
                ray.kill(handle)
        self.groups.clear()


def generate(engine: WorkerGroup, prompts: int, step: int) -> tuple[SampleRefs, RolloutBatch, int]:
    """Answer each row of "prompts" once. Returns references to the samples, the batch, and its policy version."""
    rows = np.arange(prompts)
    call = request(RolloutApi.generate, "prompts", rows, np.zeros_like(rows), step)
    ref, info = engine.scatter([call], stored_returns=1).get()[0]
    return SampleRefs.of([ref], [rows], prompts), ray.get(ref), int(info.max_versions.max(initial=0))


def log_probs(actor: WorkerGroup, refs: SampleRefs) -> np.ndarray:
    """[answer tokens] the trainer's log-probabilities, row after row. Every rank computes all rows."""
    micro_batches = list(np.array_split(np.arange(len(refs)), 2))
    first, *others = (ragged.values for ragged, _ in actor.call(PolicyApi.log_probs, refs, micro_batches).get())
    for other in others:
        np.testing.assert_array_equal(first, other)
    return first


# ---------------------------------------------------------------- learning

DEMONSTRATIONS = [Row(f"{i} and {i} is ", completion=str(2 * i)) for i in range(16)]
PAIRS = [Row(f"{i} and {i} is ", chosen=str(2 * i), rejected=str(2 * i + 1)) for i in range(16)]


def load(group: WorkerGroup, model: Path, kind: RowKind = "demonstration", **settings: Any) -> None:
    """Load a model into a group, and the rows for `train`. settings: of the model."""
    chosen = ModelSettings.model_validate({"path": str(model), "dtype": "float32"} | settings)
    group.call(TrainerApi.load, str(model), chosen, OptimizerSettings(lr=1e-2, weight_decay=0.1)).get()
    group.call(WorkerApi.add_rows, "rows", encoded(DEMONSTRATIONS if kind == "demonstration" else PAIRS, kind)).get()


def train(
    group: WorkerGroup,
    step: int,
    method: Callable[
        [Any, SupervisedBatch, StageStep, tuple[int, ...]], dict[str, float]
    ] = PolicyApi.train_demonstrations,
    spoil: str = "",
) -> dict[str, float]:
    """One optimizer step on eight rows, two micro-batches per rank; `spoil` applies to the last rank only."""
    if spoil:
        group.scatter([request(OpenApi.spoil, how) for how in [""] * (len(group) - 1) + [spoil]]).get()
    rows = np.random.default_rng(step).permutation(16)[:8].reshape(len(group), 2, -1)
    parts = [SupervisedBatch("rows", list(mine), 30) for mine in rows]
    results = group.scatter([request(method, part, StageStep(1, 1), (1, step)) for part in parts]).get()
    for other in results[1:]:
        assert str(other) == str(results[0]), "every rank reports the whole"  # as text, in which NaN is like NaN
    return results[0]


Held = list[dict[str, np.ndarray]]
"""Result of `held` for each rank: all tensors that training changes."""


def same_held(actual: Held, expected: Held) -> None:
    """Assert equality, bit for bit."""
    for rank, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert a.keys() == b.keys()
        assert any(name.startswith("exp_avg_sq") for name in a)
        for name in b:
            np.testing.assert_array_equal(a[name], b[name], f"{name} of rank {rank}")


def steps(group: WorkerGroup, *numbers: int) -> list[dict[str, float]]:
    """The metrics of these steps of demonstrations."""
    return [train(group, step) for step in numbers]


def close(actual: list[dict[str, float]], expected: list[dict[str, float]], rel: float) -> None:
    """Assert equal metrics within `rel`, or `rel / 10` absolutely."""
    for step, (a, b) in enumerate(zip(actual, expected, strict=True), start=1):
        assert a == pytest.approx(b, rel=rel, abs=rel / 10), step
