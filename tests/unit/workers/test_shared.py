"""Roles that share a frozen base give the same results as separate roles, with the memory of one base."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification

from configs.schema import Role, RunConfig
from orchestrator.worker_groups.calls import run_concurrently
from orchestrator.worker_groups.team import Team
from placement import Cluster, make_plan
from tests.support.apis import OpenApi, SharingApi, SharingTrainerApi
from tests.support.models import WIDTH, encoded, make_model
from tests.unit.workers.test_ranks import ADAM, SAMPLES, demonstrations, fake_experience
from workers.api import PolicyApi, RewardsApi, TrainerApi, ValueApi
from workers.models.lora import base_of

pytestmark = pytest.mark.slow

ROLES: tuple[Role, ...] = ("actor", "critic", "reference", "reward")
LEARNING: tuple[Role, ...] = ("actor", "critic")
STEPS = 2


def run_config(folder: Path) -> RunConfig:
    data = {"path": "rows.jsonl"}
    ppo = {
        "prompts": data,
        "steps": STEPS,
        "prompts_per_step": SAMPLES,
        "mini_batches": 2,
        "micro_batch_tokens": 160,
        "actor_optimizer": ADAM,
        "critic_optimizer": ADAM,
    }
    return RunConfig.model_validate({
        "name": "shared",
        "seed": 7,
        "plugins": ["tests.support.sharing"],
        "strategies": {"actor": "zero2", "critic": "zero1"},
        "shared_base": list(ROLES),
        "model": {"path": str(folder), "dtype": "float32", "lora": {"rank": 4}, "gradient_checkpointing": True},
        "ppo": ppo,
        "placement": {"devices": {"actor": 2}, "cpus_per_device": 1},
        "deadlines": {"initial_timeout": 240},
    })  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), "llama", tied=False, seed=5)


@pytest.fixture(scope="module")
def team(ray_here: Cluster, folder: Path) -> Iterator[Team]:
    """All roles but the engines, on two ranks."""
    plan = make_plan(run_config(folder), "ppo", ray_here)
    roles: dict[Role, Any] = {role: planned for role, planned in plan.roles.items() if role != "rollout"}
    groups = tuple(group for group in plan.groups if "rollout" not in group.roles)
    team = Team.start(run_config(folder), replace(plan, roles=roles, groups=groups))
    try:
        yield team
    finally:
        team.stop()


@pytest.fixture(scope="module")
def reward_model(team: Team, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model with an adapter on the policy, and a head and scores that differ from the other roles'."""
    out, critic = tmp_path_factory.mktemp("rm") / "rm", team.groups["critic"]
    critic.call(SharingApi.leave, True).get()
    critic.call(TrainerApi.load, str(folder), team.config.model, ADAM).get()
    critic.call(OpenApi.add_noise, 0.05, 1).get()
    team.add_data("rows", encoded(demonstrations(12), "demonstration", 40), "critic")
    critic.call(ValueApi.normalize, "rows", [np.arange(6)]).get()
    critic.call(TrainerApi.export, str(out)).get()
    return out


def test_plain_peft_reads_the_reward_models_adapter_with_its_head(reward_model: Path, folder: Path) -> None:
    ids = torch.tensor(np.random.default_rng(0).integers(3, 100, (3, 17)))
    whole = AutoModelForSequenceClassification.from_pretrained(reward_model)
    base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    assert base_of(reward_model / "adapter") == str(folder.resolve())
    with torch.no_grad():
        expected = whole.eval()(ids).logits
        actual = PeftModel.from_pretrained(base, reward_model / "adapter").eval()(ids).logits
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert float(expected.std()) > 0.01
    config = AutoConfig.from_pretrained(reward_model / "adapter")
    assert (config.num_labels, config.score_mean, config.score_std) == (
        1,
        whole.config.score_mean,
        whole.config.score_std,
    )
    assert config.score_std != 1.0


@dataclass
class Results:
    """Outputs of the roles before and after PPO steps, metrics of the steps, and the exported actor."""

    before: dict[str, np.ndarray]
    steps: list[dict[str, float]]
    after: dict[str, np.ndarray]
    weights: dict[str, Tensor]


def load(team: Team, reward_model: Path, alone: bool) -> None:
    ppo, model = team.config.ppo, team.config.model
    assert ppo is not None
    for role in ROLES:
        team.groups[role].call(SharingApi.leave, alone).get()
    run_concurrently(
        team.groups["actor"].call(TrainerApi.load, model.path, model, ppo.actor_optimizer),
        team.groups["critic"].call(TrainerApi.load, str(reward_model), model, ppo.critic_optimizer),
        team.groups["reference"].call(TrainerApi.load, model.path, model, None),
        team.groups["reward"].call(RewardsApi.load, model.path, {"model": str(reward_model)}),
    )


def outputs(team: Team, experience: Any) -> dict[str, np.ndarray]:
    rollouts = experience.rollouts
    own = team._column("actor", PolicyApi.log_probs, rollouts)
    policy, reference, values, scores = run_concurrently(
        own, team.log_probs(rollouts), team.values(rollouts), team.scores(rollouts, ["model"])
    )
    columns = {"actor": policy, "reference": reference, "critic": values}
    arrays = {name: np.concatenate(column.refs.fetch()) for name, column in columns.items()}
    return arrays | {"reward": scores["model"].values}


def learn(team: Team, experience: Any, step: int) -> dict[str, float]:
    actor, critic = run_concurrently(
        team.train_actor(experience, step, STEPS), team.train_critic(experience, step, STEPS)
    )
    return {**actor, **critic}


@pytest.fixture(scope="module")
def experience(folder: Path, ray_here: Cluster) -> Any:
    return replace(fake_experience(folder, run_config(folder)), ptx=[])


@pytest.fixture(scope="module")
def run(team: Team, reward_model: Path, experience: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    @cache
    def get(alone: bool) -> Results:
        load(team, reward_model, alone)
        before = outputs(team, experience)
        steps = [learn(team, experience, step) for step in range(1, STEPS + 1)]
        out = tmp_path_factory.mktemp("exported")
        team.groups["actor"].call(TrainerApi.export, str(out)).get()
        return Results(before, steps, outputs(team, experience), load_file(out / "model.safetensors"))

    return get


def test_shared_roles_are_one_process(team: Team) -> None:
    handles = {handle for role in ROLES for handle in team.groups[role].handles}
    assert len(handles) == 2
    assert len({place.pid for role in ROLES for place in team.groups[role].locations.values()}) == 2
    [group] = team.plan.groups
    assert group.roles == ROLES
    memory = team.memory()
    assert memory["actor"] == pytest.approx(memory["reward"], rel=0.1), "each role has its share of the process"


def test_shared_roles_give_the_results_of_separate_roles(run: Any) -> None:
    shared, separate = run(False), run(True)
    for role in ROLES:
        np.testing.assert_allclose(shared.before[role], separate.before[role], rtol=1e-4, atol=2e-5, err_msg=role)
        np.testing.assert_allclose(shared.after[role], separate.after[role], rtol=1e-3, atol=2e-4, err_msg=role)
    for a, b in zip(shared.steps, separate.steps, strict=True):
        assert a == pytest.approx(b, rel=2e-4, abs=2e-5)
    assert shared.weights.keys() == separate.weights.keys()
    for name, weight in separate.weights.items():
        torch.testing.assert_close(shared.weights[name], weight, rtol=0, atol=1e-4)


def test_training_one_role_does_not_change_the_others(run: Any) -> None:
    results: Results = run(False)
    for role in ("reference", "reward"):
        np.testing.assert_array_equal(results.before[role], results.after[role], role)
    for role in ("actor", "critic"):
        assert np.abs(results.before[role] - results.after[role]).max() > 1e-3, role
    np.testing.assert_array_equal(
        results.before["actor"], results.before["reference"], "the adapter has learned nothing yet"
    )


def test_only_the_trained_role_changes(team: Team, reward_model: Path, experience: Any) -> None:
    load(team, reward_model, alone=False)
    first = outputs(team, experience)
    critic = team.train_critic(experience, 1, STEPS)
    assert critic is not None
    critic.get()
    second = outputs(team, experience)
    team.train_actor(experience, 1, STEPS).get()
    third = outputs(team, experience)
    assert [role for role in ROLES if not np.array_equal(first[role], second[role])] == ["critic"]
    assert [role for role in ROLES if not np.array_equal(second[role], third[role])] == ["actor"]


def test_one_base_is_all_the_memory(team: Team, reward_model: Path) -> None:
    def bytes_of(alone: bool) -> tuple[int, dict[str, int]]:
        load(team, reward_model, alone)
        held_by = dict(zip(ROLES, (team.groups[role].first(SharingApi.storage) for role in ROLES), strict=True))
        every = {address: size for held in held_by.values() for address, size in held.items()}
        return sum(every.values()), {role: sum(held.values()) for role, held in held_by.items()}

    shared, each = bytes_of(alone=False)
    separate, _ = bytes_of(alone=True)
    base, head = each["reference"], 4 * WIDTH
    adapter = each["actor"] - base
    assert shared == base + 4 * adapter + 2 * head, "one base, and the adapters and heads of three roles"
    assert separate > 2.5 * shared, "four bases"


def test_a_checkpoint_holds_the_roles_own_parameters_and_training_continues(
    team: Team, reward_model: Path, experience: Any, tmp_path: Path
) -> None:
    load(team, reward_model, alone=False)
    learn(team, experience, 1)
    for role in LEARNING:
        team.groups[role].call(TrainerApi.save, str(tmp_path / role)).get()
        saved: set[str] = team.groups[role].first(SharingTrainerApi.saved)
        assert saved and all(".default." in name or ".score." in name for name in saved)
    expected = learn(team, experience, 2)
    expected_outputs = outputs(team, experience)
    load(team, reward_model, alone=False)
    for role in LEARNING:
        team.groups[role].call(TrainerApi.restore, str(tmp_path / role)).get()
    assert learn(team, experience, 2) == expected
    for who, values in outputs(team, experience).items():
        np.testing.assert_array_equal(values, expected_outputs[who], who)

    load(team, reward_model, alone=True)  # `shared_base` may change when a run is resumed
    for role in LEARNING:
        team.groups[role].call(TrainerApi.restore, str(tmp_path / role)).get()
    assert learn(team, experience, 2) == pytest.approx(expected, rel=2e-4, abs=2e-5)


def test_a_reward_model_that_is_no_adapter_is_refused(team: Team, folder: Path, tmp_path: Path) -> None:
    critic = team.groups["critic"]
    critic.call(SharingApi.leave, True).get()
    critic.call(TrainerApi.load, str(folder), team.config.model.model_copy(update={"lora": None}), ADAM).get()
    critic.call(TrainerApi.export, str(tmp_path / "full")).get()
    with pytest.raises(Exception, match=r"full has no adapter with a head"):
        load(team, tmp_path / "full", alone=False)
    other = make_model(tmp_path / "other")
    critic.call(SharingApi.leave, True).get()
    critic.call(TrainerApi.load, str(other), team.config.model, ADAM).get()
    critic.call(TrainerApi.export, str(tmp_path / "elsewhere")).get()
    with pytest.raises(Exception, match=r"other: the roles of this process share .* as base"):
        load(team, tmp_path / "elsewhere", alone=False)
