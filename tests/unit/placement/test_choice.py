"""What `strategy: auto` becomes."""

from __future__ import annotations

from typing import Any

import pytest

from configs.schema import RunConfig
from placement import Cluster, PlanError
from placement.memory import auto_roles, keep_resolved, resolve
from placement.memory.auto_strategy import FASTEST_FIRST

ADAM = {"lr": 1e-5}


def run(path: str = "preset:l", **settings: Any) -> RunConfig:
    ppo = {"prompts": {"path": "p"}, "steps": 1, "actor_optimizer": ADAM, "critic_optimizer": ADAM}
    base = {"name": "run", "strategy": "auto", "model": {"path": path, "dtype": "bfloat16"}, "ppo": ppo}
    base["placement"] = {"devices": dict.fromkeys(("actor", "critic", "reference", "reward"), 8)}
    base["recovery"] = {"snapshot_every": None}
    return RunConfig.model_validate(base | settings)


def chosen(cluster: str, config: RunConfig) -> list[str]:
    resolved = resolve(config, ["ppo"], Cluster.parse(cluster))
    assert not auto_roles(resolved)
    assert resolve(resolved, ["ppo"], Cluster.parse(cluster)) is resolved
    return [resolved.strategy_of(role) for role in ("actor", "critic", "reference")]


def test_the_fastest_where_there_is_room() -> None:
    assert chosen("5x8xA100-80GB,host=1TB", run()) == ["ddp", "ddp", "ddp"]


def test_larger_models_take_costlier_strategies() -> None:
    strategies = [chosen("5x8xA100-80GB,host=2TB", run(f"preset:{size}"))[0] for size in ("l", "6b", "12b", "18b")]
    ranks = [FASTEST_FIRST.index(strategy) for strategy in strategies]
    assert ranks == sorted(ranks)
    assert len(set(strategies)) >= 3


def test_a_role_takes_a_faster_one_where_that_fits() -> None:
    small = {"model": {"path": "preset:m", "dtype": "bfloat16"}, "train": {"path": "p"}, "optimizer": ADAM}
    actor, critic, _ = chosen("5x8xA100-80GB,host=2TB", run("preset:12b", rm=small))
    assert critic == "ddp"
    assert FASTEST_FIRST.index(actor) > 0


def test_nothing_fits_takes_the_tightest() -> None:
    config = run("preset:40b", placement={"layout": "colocated"})
    assert chosen("1x1xA100-40GB,host=4TB", config)[0] == "zero3_offload"


def test_a_named_strategy_stays() -> None:
    config = run("preset:l", strategies={"critic": "zero2"})
    assert chosen("5x8xA100-80GB,host=1TB", config)[1] == "zero2"


def test_on_cpu_nothing_is_offloaded() -> None:
    config = run("preset:xl", placement={}, model={"path": "preset:xl", "dtype": "float32"})
    assert all("offload" not in strategy for strategy in chosen("1x8cpu,host=64GB", config))


def test_what_cannot_be_predicted_is_refused() -> None:
    with pytest.raises(PlanError, match="strategy: auto needs predicted memory, but some/model is neither"):
        chosen("1x8cpu,host=64GB", run("some/model", placement={}))
    with pytest.raises(PlanError, match="strategy: auto needs the memory size of every device"):
        chosen("5x8xA100", run())


def test_a_run_that_began_keeps_the_type_of_each_model() -> None:
    adam, data = {"lr": 1e-4}, {"path": "p"}

    def config(policy: str, reward: str) -> RunConfig:
        model = {"path": "preset:s", "dtype": policy}
        rm = {"train": data, "optimizer": adam, "model": {"path": "preset:s", "dtype": reward}}
        return RunConfig.model_validate({"name": "run", "model": model, "rm": rm})

    for policy, reward in (("float32", "bfloat16"), ("bfloat16", "float32")):
        old = config(policy, reward)
        assert keep_resolved(config("auto", "auto"), old) == keep_resolved(config(policy, "auto"), old) == old


def test_a_run_that_began_keeps_its_strategies() -> None:
    old = run(strategy="zero2", strategies={"critic": "zero1"})
    resolved = keep_resolved(run(), old)
    assert [resolved.strategy_of(role) for role in ("actor", "critic", "reference")] == ["zero2", "zero1", "zero2"]
    assert keep_resolved(run(strategy="ddp"), old).strategy == "ddp"
