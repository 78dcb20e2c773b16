"""PPO on each architecture: two steps with a critic, a reward model and a function, on random models.

One team of workers loads them in turn. The second step's answers come from the weights that the first one published: its
log-probability gap, and its policy version, say that they arrived.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from benchmarks.families.zoo import make
from configs.schema import RunConfig
from orchestrator import Experience, KLTerm, run_concurrently, start_team
from orchestrator.evaluation.evaluate import weighted_sum
from orchestrator.worker_groups.failures import WorkerError
from orchestrator.worker_groups.team import Team
from placement import Cluster
from tests.support.apis import DyingRolloutApi
from tests.support.models import ARCHITECTURES, make_model, make_reward_model
from workers.api import RolloutApi
from workers.data import Row
from workers.weight_sync.probe import Probe

pytestmark = pytest.mark.slow

KINDS = {
    "gpt2": ("gpt2", True, False),
    "bloom": ("bloom", True, False),
    "llama, tied, grouped": ("llama", True, True),
    "qwen2, untied": ("qwen2", False, True),
    "qwen3_moe": ("qwen3_moe", False, False),
    "gemma2": ("gemma2", True, False),
}
"""Architecture, whether its word embeddings are tied, whether query heads share key-value heads (of those of
tests.support.models)."""
PROMPTS = ["a", "bc", "the film", "what a plot", "why", "it was 1999", "no", "cast: "]
CONFIG = RunConfig.model_validate({
    "name": "architecture",
    "plugins": ["tests.support.dying"],
    "model": {"path": "loaded in turn", "dtype": "float32"},
    "ppo": {
        "prompts": {"path": "prompts.jsonl"},
        "steps": 2,
        "prompts_per_step": 8,
        "mini_batches": 2,
        "max_prompt_tokens": 16,
        "value_clip_range": 10,  # so wide that no value is clipped in any update
        "rewards": [
            {"kind": "model"},
            {"kind": "function", "name": "letters", "function": "tests.support.reward_functions:letters", "weight": 0.5},
        ],
        "actor_optimizer": {"lr": 0.003},
        "critic_optimizer": {"lr": 0.003},
    },
    "rollout": {"max_new_tokens": 8, "kv_cache_gib": 0.03125, "max_sequences": 8},
    "placement": {"cpus_per_device": 1},
    "deadlines": {"initial_timeout": 240},
})  # fmt: skip


@pytest.fixture(scope="module")
def team(ray_here: Cluster) -> Iterator[Team]:
    with start_team(CONFIG) as started:
        yield started


@pytest.mark.parametrize("kind", KINDS)
def test_ppo_runs_on(team: Team, tmp_path: Path, kind: str) -> None:
    architecture, tied, grouped = KINDS[kind]
    if architecture in ARCHITECTURES:
        start = make_model(tmp_path / "model", architecture, tied, grouped, seed=1)
    else:
        start = make(tmp_path / "model", architecture, seed=1)
    team.load(str(start), {"model": str(make_reward_model(start, tmp_path / "reward"))})
    team.add_prompts("prompts", [Row(prompt, columns={"wanted": prompt[0]}) for prompt in PROMPTS])
    kl = [ppo_step(team, step) for step in (1, 2)]
    assert abs(kl[0]) < 1e-3, "the actor is the reference at first"
    assert kl[1] > 0.01, "and then no longer"

    team.export("actor", trained := tmp_path / "trained")
    exported = AutoModelForCausalLM.from_pretrained(trained)
    assert type(exported).__name__ == type(AutoModelForCausalLM.from_pretrained(start)).__name__
    assert exported.config.tie_word_embeddings is tied
    before, after = load_file(start / "model.safetensors"), load_file(trained / "model.safetensors")
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == set(before), "every weight has changed"


def ppo_step(team: Team, step: int) -> float:
    """One step, whose weights are published; the KL to the reference before it, nats per token."""
    assert CONFIG.ppo is not None
    rollouts = team.generate("prompts", np.arange(len(PROMPTS)), step).get()
    assert set(rollouts.min_versions) == set(rollouts.max_versions) == {step - 1}
    reference, values, scores = run_concurrently(
        team.log_probs(rollouts), team.values(rollouts), team.scores(rollouts, ["model", "letters"])
    )
    reward = weighted_sum(scores, CONFIG.ppo)
    assert np.isfinite(reward).all()
    np.testing.assert_allclose(reward, scores["model"].values + 0.5 * scores["letters"].values, atol=1e-5)
    reward[step] = np.nan  # one answer without a score, which costs this sample alone
    assert values is not None and np.isfinite(values.per_answer).all()
    experience = Experience(rollouts, reference, values, reward, KLTerm(reward_coefficient=0.05))
    steps = CONFIG.ppo.steps
    actor, critic = run_concurrently(
        team.train_actor(experience, step, steps), team.train_critic(experience, step, steps)
    )
    numbers = {name: value for name, value in (actor | critic).items() if isinstance(value, int | float)}
    assert all(math.isfinite(value) for value in numbers.values()), numbers
    assert actor["logprob_mismatch"] <= 1e-3
    assert actor["grad_norm/actor"] > 0
    assert critic["grad_norm/critic"] > 0
    team.sync_weights(step)
    return float(reference.per_answer.sum() / rollouts.trained_tokens.sum())


# ---------------------------------------------------------------- proof by computing

DIFFERS = (
    r"failed in prove: DifferentModel: rollout-0, version {}, does not compute what the trainer computes: their "
    r"log-probabilities of the same 4[68] tokens differ by (\d\S+) in the mean, and 0\.0001 is allowed"
)


def begin(team: Team, start: Path) -> None:
    team.load(str(start), {"model": str(make_reward_model(start, start.parent / "reward"))})
    team.add_prompts("prompts", [Row(prompt) for prompt in PROMPTS])


def refused(version: int, action: Callable[[], Any]) -> None:
    """An error with the engine's difference and the allowed one."""
    with pytest.raises(WorkerError) as caught:
        action()
    found = re.search(DIFFERS.format(version), str(caught.value))
    assert found and float(found[1]) > 0.01, caught.value


def test_an_engine_that_computes_something_else_after_an_update_is_an_error(team: Team, tmp_path: Path) -> None:
    """Its weights arrived as they were sent, and are sent once more; it answers nothing, and no evaluation uses it."""
    begin(team, make_model(tmp_path / "model", "llama", seed=1))
    failures: list[tuple[str, str]] = []
    team.recovery.on_failure = lambda role, kind: failures.append((role, kind))
    engine = team.groups["rollout"]
    engine.call(DyingRolloutApi.go_wrong, "finish_weight_update", 2).get()
    refused(1, lambda: team.sync_weights(1))
    assert failures == [("rollout", "error")], "the first time"
    with pytest.raises(WorkerError, match=r"StaleWeights: rollout-0 has no verified weights"):
        team.generate("prompts", np.arange(2), 1).get()

    engine.call(DyingRolloutApi.go_wrong, "finish_weight_update", 1).get()
    assert team.sync_weights(1).gap < 1e-5, "sending them once more repairs it"
    assert len(failures) == 2
    assert set(team.generate("prompts", np.arange(2), 1).get().max_versions) == {1}


def test_an_engine_that_computes_something_else_from_the_start_is_an_error(team: Team, tmp_path: Path) -> None:
    start = make_model(tmp_path / "model", "llama", seed=1)
    team.groups["rollout"].call(DyingRolloutApi.go_wrong, "load", 1).get()
    refused(0, lambda: begin(team, start))
    begin(team, start)


def test_a_changed_export_folder_is_detected(team: Team, tmp_path: Path) -> None:
    """By the probe in the folder, which chat and generate check."""
    begin(team, make_model(tmp_path / "model", "llama", seed=1))
    team.export("actor", trained := tmp_path / "trained")
    engine, probe = team.groups["rollout"], Probe.load(trained)
    assert probe
    engine.call(RolloutApi.load, str(trained), "object_store", 64).get()
    assert engine.call(RolloutApi.prove, 0, probe).get()[0] < 1e-5
    tensors = load_file(trained / "model.safetensors")
    tensors["model.norm.weight"] *= 1.1
    save_file(tensors, trained / "model.safetensors", metadata={"format": "pt"})
    engine.call(RolloutApi.load, str(trained), "object_store", 64).get()
    refused(0, lambda: engine.call(RolloutApi.prove, 0, probe).get())
