"""Workers outside a team: groups on the tests' cluster, one thread each, to be loaded with one tiny model after another."""

from __future__ import annotations

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
from orchestrator.worker_groups.calls import Call, WorkerGroup
from orchestrator.worker_groups.deadlines import Deadlines
from tests.support.models import encoded
from workers.data import Row, RowKind
from workers.data.samples import RolloutBatch, SampleRefs
from workers.data.step_inputs import SupervisedBatch
from workers.process.worker import WorkerSpec, environment
from workers.process.worker_process import WorkerProcess
from workers.training.schedule import StageStep

DEADLINES = Deadlines(DeadlineSettings(first=240.0, start=240.0))


def run_config(**settings: Any) -> RunConfig:
    """Settings of a small PPO run."""
    data, adam = {"path": "rows.jsonl"}, {"lr": 0.03}
    ppo = {"prompts": data, "steps": 1, "actor_optimizer": adam, "critic_optimizer": adam}
    rollout = {"max_new_tokens": 24, "kv_cache_gib": 0.1, "max_sequences": 16, "temperature": 0.8}
    base = {"name": "tests", "model": {"path": "model", "dtype": "float32"}, "ppo": ppo, "rollout": rollout}
    base["rm"] = {"train": data, "optimizer": adam}
    return RunConfig.model_validate(base | settings)


class Hosts:
    """Groups by kind and size; each is started when it is first asked for. A trainer takes up the strategy asked for at its
    next `load`, so that one process serves many tests: most of a test would be its start."""

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
        """another: other processes than without it. served: an adapter that is published alone."""
        key = (kind, ranks, another, served.model_dump_json() if served else "")
        if key not in self.groups:
            plugin = "tests.support.learners" if kind.startswith("open") else "tests.support.faults"
            model = {"path": "model", "dtype": "float32", "lora": served}
            config = run_config(plugins=[plugin], model=model, publish={"lora": "adapter" if served else "merged"})
            env = {"env_vars": environment(config, role, "cpu", 1)}
            specs = [WorkerSpec(config, role, rank, ranks, "cpu", 1) for rank in range(ranks)]
            handles = [
                ray.remote(WorkerProcess).options(num_cpus=1, runtime_env=env).remote([(kind, spec)]) for spec in specs
            ]
            self.groups[key] = WorkerGroup(role, handles, " ".join(map(str, key)), DEADLINES)
            self.groups[key].call("join", self.groups[key].first("address")).get()
        if role != "rollout":
            self.groups[key].call("become", strategy, {}).get()
        return self.groups[key]

    def stop(self) -> None:
        for group in self.groups.values():
            for handle in group.handles:
                ray.kill(handle)
        self.groups.clear()


def generate(engine: WorkerGroup, prompts: int, step: int) -> tuple[SampleRefs, RolloutBatch, int]:
    """Answer each row of "prompts" once: where the answers lie, the answers, and the version that wrote them."""
    rows = np.arange(prompts)
    call: Call[list[Any]] = engine.scatter("generate", [("prompts", rows, np.zeros_like(rows), step)], keep=1)
    ref, written = call.get()[0]
    return SampleRefs.of([ref], [rows], prompts), ray.get(ref), int(written.max_versions.max(initial=0))


def log_probs(actor: WorkerGroup, refs: SampleRefs) -> np.ndarray:
    """[answer tokens] the trainer's log-probabilities, row after row; every rank computes them all."""
    micro_batches = list(np.array_split(np.arange(len(refs)), 2))
    first, *others = (ragged.values for ragged, _ in actor.call("log_probs", refs, micro_batches).get())
    for other in others:
        np.testing.assert_array_equal(first, other)
    return first


# ---------------------------------------------------------------- learning

DEMONSTRATIONS = [Row(f"{i} and {i} is ", completion=str(2 * i)) for i in range(16)]
PAIRS = [Row(f"{i} and {i} is ", chosen=str(2 * i), rejected=str(2 * i + 1)) for i in range(16)]


def load(group: WorkerGroup, model: Path, kind: RowKind = "demonstration", **settings: Any) -> None:
    """Let a group begin with a model, and give it what `train` trains on. settings: of the model."""
    chosen = ModelSettings.model_validate({"path": str(model), "dtype": "float32"} | settings)
    group.call("load", str(model), chosen, OptimizerSettings(lr=1e-2, weight_decay=0.1)).get()
    group.call("add_rows", "rows", encoded(DEMONSTRATIONS if kind == "demonstration" else PAIRS, kind)).get()


def train(group: WorkerGroup, step: int, method: str = "train_demonstrations", spoil: str = "") -> dict[str, float]:
    """One optimizer step on eight rows, two micro-batches a rank; `spoil` happens on the last rank alone."""
    if spoil:
        group.scatter("spoil", [("",)] * (len(group) - 1) + [(spoil,)]).get()
    rows = np.random.default_rng(step).permutation(16)[:8].reshape(len(group), 2, -1)
    parts = [SupervisedBatch("rows", list(mine), 30) for mine in rows]
    results: list[dict[str, float]] = group.scatter(
        method, [(part, StageStep(1, 1), (1, step)) for part in parts]
    ).get()
    for other in results[1:]:
        assert str(other) == str(results[0]), "every rank reports the whole"  # as text, in which NaN is like NaN
    return results[0]


Held = list[dict[str, np.ndarray]]
"""What `held` says of each rank: all that learning changes."""


def same_held(found: Held, wanted: Held) -> None:
    """Bit for bit."""
    for rank, (a, b) in enumerate(zip(found, wanted, strict=True)):
        assert a.keys() == b.keys()
        assert any(name.startswith("exp_avg_sq") for name in a)
        for name in b:
            np.testing.assert_array_equal(a[name], b[name], f"{name} of rank {rank}")


def steps(group: WorkerGroup, *numbers: int) -> list[dict[str, float]]:
    """The metrics of these steps of demonstrations."""
    return [train(group, step) for step in numbers]


def close(found: list[dict[str, float]], wanted: list[dict[str, float]], rel: float) -> None:
    """The same metrics within `rel`; a tenth of it where they are near 0."""
    for step, (a, b) in enumerate(zip(found, wanted, strict=True), start=1):
        assert a == pytest.approx(b, rel=rel, abs=rel / 10), step
