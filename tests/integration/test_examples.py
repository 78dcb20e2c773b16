"""The examples run, on a tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest

from examples import reinforce, run_ppo
from orchestrator.storage.metrics_file import read_metrics
from placement.cluster import Cluster

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def test_reinforce_raises_the_reward_and_leaves_a_model(
    micro: Path, ray_here: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    rewards = reinforce.main(str(micro), "ppo.steps=12", "ppo.prompts_per_step=16", "ppo.actor_optimizer.lr=3e-3")
    assert len(rewards) == 12
    assert sum(rewards[-3:]) > sum(rewards[:3])
    assert (micro.parent / "runs" / "reinforce" / "models" / "reinforce" / "model.safetensors").exists()
    assert "reward on held-out prompts: " in capsys.readouterr().out


def test_run_ppo_prints_its_result(micro: Path, ray_here: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    """Also where the first step lacks a score, and the second has none."""
    # The test of the other example has trained the stages before PPO.
    fails = "{kind: function, name: fails, function: 'tests.support.reward_functions:fewer_and_fewer'}"
    rewards = ["ppo.max_unscored=1", f"ppo.rewards=[{{kind: model}}, {fails}]"]
    result = run_ppo.main(str(micro), "name=reinforce", "ppo.steps=2", *rewards)
    assert result.report.exists()
    assert (result.models["ppo"] / "model.safetensors").exists()
    out = capsys.readouterr().out
    assert "nats per token" in out
    first, second = read_metrics(result.folder)[-2:]
    assert (first["unscored"], first["updates"], first["errors/fails"]) == (1, 2, 1)
    assert (second["unscored"], second["updates"], second["errors/fails"]) == (8, 0, 8)
    assert second["policy_version"] == 1
    assert "reward/mean" in first and "reward/mean" not in second and "reward/model" in second
    assert "warning: step 2: none of its 8 responses has a score; the step trains nothing" in out
