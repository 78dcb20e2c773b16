"""The examples run, on a tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest

from examples import reinforce, run_ppo
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


def test_run_ppo_tells_what_it_achieved(micro: Path, ray_here: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    # The example before has trained the stages before PPO.
    result = run_ppo.main(str(micro), "name=reinforce", "ppo.steps=2")
    assert result.report.exists()
    assert (result.models["ppo"] / "model.safetensors").exists()
    assert "nats per token" in capsys.readouterr().out
