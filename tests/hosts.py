"""Workers outside a team: groups on the tests' cluster, one thread each, to be loaded with one tiny model after another."""

from __future__ import annotations

from typing import Any

import numpy as np
import ray

from configs.schema import DeadlineSettings, Role, RunConfig, Strategy
from orchestrator.calls import Call, WorkerGroup
from orchestrator.deadlines import Deadlines
from workers.host import Host
from workers.sequences import Chunk, Placed
from workers.worker import WorkerSpec, environment

DEADLINES = Deadlines(DeadlineSettings(first=240.0, start=240.0))


def run_config(**settings: Any) -> RunConfig:
    """Settings of a small PPO run whose workers know tests.faults."""
    data, adam = {"path": "rows.jsonl"}, {"lr": 0.03}
    ppo = {"prompts": data, "steps": 1, "actor_optimizer": adam, "critic_optimizer": adam}
    rollout = {"max_new_tokens": 24, "kv_cache_gib": 0.1, "max_sequences": 16, "temperature": 0.8}
    base = {"name": "tests", "model": {"path": "model"}, "plugins": ["tests.faults"], "ppo": ppo, "rollout": rollout}
    base["rm"] = {"train": data, "optimizer": adam}
    return RunConfig.model_validate(base | settings)


class Hosts:
    """Groups by kind and strategy; each is started when it is first asked for."""

    def __init__(self) -> None:
        self.groups: dict[tuple[str, Strategy, int], WorkerGroup] = {}

    def group(self, kind: str, role: Role, strategy: Strategy = "ddp", ranks: int = 1) -> WorkerGroup:
        key = (kind, strategy, ranks)
        if key not in self.groups:
            config = run_config(strategy=strategy)
            env = {"env_vars": environment(config, role, "cpu", 1)}
            specs = [WorkerSpec(config, role, rank, ranks, "cpu", 1) for rank in range(ranks)]
            handles = [ray.remote(Host).options(num_cpus=1, runtime_env=env).remote(kind, spec) for spec in specs]
            self.groups[key] = WorkerGroup(role, handles, f"{kind}-{strategy}", DEADLINES)
            self.groups[key].call("join", self.groups[key].first("address")).get()
        return self.groups[key]

    def stop(self) -> None:
        for group in self.groups.values():
            for handle in group.handles:
                ray.kill(handle)


def generate(engine: WorkerGroup, prompts: int, step: int) -> tuple[Placed, Chunk, int]:
    """Answer each row of "prompts" once: where the answers lie, the answers, and the version that wrote them."""
    rows = np.arange(prompts)
    call: Call[list[Any]] = engine.scatter("generate", [("prompts", rows, np.zeros_like(rows), step)], keep=1)
    ref, written = call.get()[0]
    return Placed.of([ref], [rows], prompts), ray.get(ref), written.version


def log_probs(actor: WorkerGroup, placed: Placed) -> np.ndarray:
    """[answer tokens] the trainer's log-probabilities, row after row; every rank computes them all."""
    micro_batches = list(np.array_split(np.arange(len(placed)), 2))
    first, *others = (ragged.values for ragged, _ in actor.call("log_probs", placed, micro_batches).get())
    for other in others:
        np.testing.assert_array_equal(first, other)
    return first
