"""GRPO as a plugin of a dozen lines: its numbers, what its settings refuse, and a run."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from configs import ConfigError, load_config
from orchestrator import run_stages
from orchestrator.algorithms.credit import AnswerScores, answer_advantages
from placement import Cluster, make_plan
from tests.support.micro import write_micro

SETTINGS = ["plugins=[tests.plugins.grpo]", "ppo.critic=false", "ppo.advantage=grpo"]
IN_LOSS = "ppo.kl={apply_to: loss, estimator: k3}"


@pytest.mark.parametrize(
    ("rewards", "epsilon", "wanted"),
    [
        ([1, 0, 0, 0.5], 1e-6, [1.305580, -0.783348, -0.783348, 0.261116]),
        ([1, 0, 0, 0.5], 1e-4, [1.305310, -0.783186, -0.783186, 0.261062]),
        ([1, np.nan, 0, 0, 0.5], 1e-6, [1.305580, 0, -0.783348, -0.783348, 0.261116]),
        ([0.3, 0.3, 0.3], 1e-6, [0, 0, 0]),
        ([5], 1e-6, [0]),
        ([np.nan], 1e-6, [0]),
    ],
)
def test_the_numbers_of_the_field(tmp_path: Path, rewards: list[float], epsilon: float, wanted: list[float]) -> None:
    """Of one group, and of another beside it, of which nothing may be seen."""
    chosen = [*SETTINGS, IN_LOSS, f"ppo.advantage={{kind: grpo, epsilon: {epsilon}}}"]
    ppo = load_config(write_micro(tmp_path), chosen).ppo
    assert ppo is not None
    both = np.array([*rewards, 7.0, 9.0])
    groups = np.array([1] * len(rewards) + [0, 0])
    found = answer_advantages(ppo, AnswerScores(both, groups, np.ones(len(both)), {}))
    assert found is not None
    assert found[:-2] == pytest.approx(wanted, abs=2e-6)
    assert found[-2:] == pytest.approx([-(0.5**0.5), 0.5**0.5], abs=1e-3)


def test_what_would_do_nothing_is_refused(tmp_path: Path) -> None:
    config = write_micro(tmp_path)
    with pytest.raises(ConfigError, match=r"^ppo\.critic: was true, but an advantage per response uses no values"):
        load_config(config, [SETTINGS[0], "ppo.advantage=grpo", IN_LOSS])
    with pytest.raises(
        ConfigError, match=r"^ppo\.kl\.apply_to: was reward, but an advantage per response does not include"
    ):
        load_config(config, SETTINGS)
    assert load_config(config, [*SETTINGS, "ppo.kl.controller={kind: fixed, coefficient: 0}"])
    chosen, unchosen = (
        load_config(config, [*SETTINGS, IN_LOSS, *more]).ppo for more in (["ppo.whiten_advantages=true"], [])
    )
    assert chosen and chosen.whiten_advantages
    assert unchosen and not unchosen.whiten_advantages


def test_roles_that_it_does_not_ask_for_are_not_placed(tmp_path: Path) -> None:
    config = write_micro(tmp_path)
    cluster = Cluster.parse("1x8cpu,host=16GB")
    without_kl = load_config(config, [*SETTINGS, "ppo.kl.controller={kind: fixed, coefficient: 0}"])
    assert list(make_plan(without_kl, "ppo", cluster).roles) == ["actor", "reward", "rollout"]
    with_kl = load_config(config, [*SETTINGS, IN_LOSS])
    assert list(make_plan(with_kl, "ppo", cluster).roles) == ["actor", "reference", "reward", "rollout"]


@pytest.mark.slow
def test_a_run(tmp_path: Path, ray_here: Cluster) -> None:
    """Two steps with two ranks of the actor and no reference; some answers have no score."""
    half = "{kind: function, name: half, function: 'tests.support.reward_functions:half_of_them', batch_size: 1}"
    rewards = f"[{half}, {{kind: function, name: brief, function: 'tests.support.micro:short'}}]"
    overrides = [*SETTINGS, f"ppo.rewards={rewards}", "ppo.max_unscored=0.9", "ppo.samples_per_prompt=4"]
    overrides += ["ppo.kl.controller={kind: fixed, coefficient: 0}"]
    config = load_config(write_micro(tmp_path), [*overrides, "ppo.steps=2", "placement.devices.actor=2"])
    folder = run_stages(config, ["ppo"]).folder
    steps: list[dict[str, Any]] = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    before, *steps = steps
    assert before["step"] == 0 and [step["step"] for step in steps] == [1, 2]
    assert not [name for step in (before, *steps) for name in step if "kl" in name.split("/")[-1].split("_")[:1]]
    assert '"kl": null' in (folder / "evaluation" / "after.jsonl").read_text()
    assert "KL to the reference" not in (folder / "report.html").read_text()
    for step in steps:
        assert step["updates"] == 2.0
        assert step["unscored"] > 0
        assert np.isfinite(step["loss/policy"])
        assert "loss/value" not in step
    assert any(step["advantage/std"] > 0 for step in steps)


@pytest.fixture
def plugin() -> ModuleType:
    from importlib import import_module

    return import_module("tests.plugins.grpo")


def test_the_settings_can_be_saved(tmp_path: Path, plugin: ModuleType) -> None:
    from configs import save_config

    config = load_config(write_micro(tmp_path), [*SETTINGS, IN_LOSS])
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config
    assert config.ppo is not None and isinstance(config.ppo.advantage, plugin.GRPO.Config)
