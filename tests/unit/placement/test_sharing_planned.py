"""Roles that share a process: their placement, and the settings that are refused before anything starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from configs import ConfigError, RunConfig, load_config
from orchestrator.run.run_dir import Run, RunError
from placement.plan import time_shared
from tests.support.micro import write_micro
from tests.support.runs import check
from tests.unit.placement.test_plan import plan, problems
from workers.models.lora import base_of, scalar_adapter

MODEL = {"path": "model", "lora": {"rank": 4}}
ALL = ["actor", "reference", "critic", "reward"]


def shared(roles: list[str] = ALL, **settings: Any) -> dict[str, Any]:
    return {"model": MODEL, "shared_base": roles, **settings}


@pytest.mark.parametrize("layout", ["separate", "paired", "colocated"])
def test_they_lie_in_one_group_and_ask_for_what_all_of_them_ask_for(layout: str) -> None:
    result = plan("1x8xA100-80GB,cpus=32", **shared(placement={"layout": layout, "devices": {"critic": 2}}))
    roles = {role: planned for role, planned in result.roles.items() if role != "rollout"}
    assert {planned.process_roles for planned in roles.values()} == {("actor", "critic", "reference", "reward")}
    assert {planned.ranks for planned in roles.values()} == {2}
    assert len({(planned.group, planned.threads) for planned in roles.values()}) == 1
    gpus = sum(planned.gpus for planned in roles.values())
    assert gpus == pytest.approx(0.8 if layout == "colocated" else 1.0)
    assert result.roles["rollout"].process_roles == ("rollout",)
    # A process alone on its devices keeps them; with an engine's process on them the two take turns.
    assert {time_shared(result, role) for role in result.roles} == {layout == "colocated"}


def test_groups_are_joined_for_those_who_share_alone() -> None:
    def names(roles: list[str], layout: str) -> list[str]:
        return [group.name for group in plan("1x8cpu", **shared(roles, placement={"layout": layout})).groups]

    assert names(["actor", "reference"], "separate") == ["actor+reference", "critic", "reward", "rollout"]
    assert names(["actor", "critic"], "separate") == ["actor+critic", "reference", "reward", "rollout"]
    assert names(["actor", "reference"], "paired") == ["actor+reference", "critic+reward", "rollout"]
    assert names(["actor", "critic"], "paired") == ["actor+critic+reference+reward", "rollout"]


def test_without_a_critic_and_in_other_stages_there_is_less_to_share() -> None:
    result = plan("1x8cpu", ppo={"critic": False, "advantage": "reinforce"}, **shared(["actor", "critic"]))
    assert result.roles["actor"].process_roles == ("actor",)
    assert plan("1x8cpu", "rm", **shared()).roles["reward"].process_roles == ("reward",)


@pytest.mark.parametrize("roles", [["actor", "reference"], ["critic", "reward"]])
def test_a_base_that_is_sharded_cannot_be_shared(roles: list[str]) -> None:
    result = problems("1x8cpu", **shared(roles, strategies={roles[0]: "zero3"}))
    assert list(result) == [f"strategies.{roles[0]}"]
    assert result[f"strategies.{roles[0]}"].startswith(
        f"zero3 shards the parameters of {roles[0]}, but `shared_base` needs them whole"
    )
    assert list(problems("1x8cpu", **shared(roles, strategy="zero3"))) == ["strategy"]
    plan("1x8cpu", **shared(roles, strategies={roles[0]: "zero2"}))


def test_groups_of_ones_own_that_part_them_are_refused() -> None:
    groups = [{"roles": ["actor", "critic"]}, {"roles": ["reference", "reward"]}, {"roles": ["rollout"]}]
    result = problems("1x8cpu", **shared(placement={"groups": groups}))
    assert result == {
        "shared_base": "actor, critic, reference, reward are in one process and must be in one group, but placement.groups.0 "
        "holds actor, critic, placement.groups.1 holds reference, reward"
    }


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("shared_base=[actor]", "shared_base: actor alone shares nothing; name two roles or more, or none"),
        ("shared_base=[actor,actor]", "shared_base: actor is listed more than once"),
        ("model.lora=null", "shared_base: needs model.lora, which is none"),
        ("shared_base=[actor,rollout]", "shared_base.1: "),
        ("model.lora.dora=true", "shared_base: includes critic and model.lora.dora is true"),
    ],
)
def test_settings_that_cannot_be(tmp_path: Path, override: str, says: str) -> None:
    config = write_micro(tmp_path, shared_base=ALL)
    with pytest.raises(ConfigError) as refused:
        load_config(config, ["model.lora.rank=4", override])
    assert says in str(refused.value)


# ---------------------------------------------------------------- reward models


def reward_model(folder: Path, base: Path | None) -> Path:
    """The files that name a reward model's base."""
    (folder / "adapter").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    task = {"task_type": "SEQ_CLS" if base else "CAUSAL_LM", "base_model_name_or_path": str(base)}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(task))
    return folder


def run_with(tmp_path: Path, *overrides: str) -> Run:
    config: RunConfig = load_config(
        tmp_path / "config.yaml", ["model.lora.rank=4", "shared_base=[critic,reward]", *overrides]
    )
    return Run.begin(config, ["ppo"])


def test_a_reward_model_must_be_an_adapter_on_the_base(tmp_path: Path) -> None:
    write_micro(tmp_path)
    good = reward_model(tmp_path / "good", tmp_path / "model")
    full = reward_model(tmp_path / "full", None)
    other = reward_model(tmp_path / "other", tmp_path / "good")
    adapter = scalar_adapter(str(good))
    assert adapter and base_of(adapter) == str(tmp_path / "model")
    check(run_with(tmp_path, f"ppo.rewards=[{{kind: model, path: {good}}}]"), ["ppo"])
    for model, says in (
        (full, "has no adapter with a head"),
        (other, f"is an adapter on {good}, and the roles of `shared_base`"),
    ):
        rewards = f"ppo.rewards=[{{kind: model, path: {good}}},{{kind: model, path: {model}, name: second}}]"
        with pytest.raises(RunError, match=rf"^ppo\.rewards\.1\.path: {model} {says}"):
            check(run_with(tmp_path, rewards), ["ppo"])
        check(run_with(tmp_path, rewards, "shared_base=[actor,critic]"), ["ppo"])  # the critic starts from the first


def test_a_reward_model_of_its_own_must_become_one(tmp_path: Path) -> None:
    write_micro(tmp_path)
    for path, lora, says in (
        ("model", "null", r"rm\.model\.lora: not set"),
        ("other", "{rank: 4}", r"rm\.model\.path: was "),
    ):
        run = run_with(tmp_path, f"rm.model={{path: {tmp_path / path}, lora: {lora}}}")
        run.stages = ["rm", "ppo"]
        with pytest.raises(RunError, match=f"^{says}"):
            check(run, ["ppo"])
