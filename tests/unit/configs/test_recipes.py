"""The recipes for clusters: by prediction each fits on the cluster named in its header."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from configs import load_config
from orchestrator.console.plan_command import plan_stages
from placement import Cluster
from placement.memory import MemoryEstimate

RECIPES = sorted((Path(__file__).parents[3] / "configs" / "cluster").glob("*.yaml"))
MOVIES = sorted((Path(__file__).parents[3] / "configs" / "movies").glob("*.yaml"))


@pytest.mark.parametrize("recipe", [*RECIPES, *MOVIES], ids=lambda path: path.stem)
def test_the_critic_can_be_left_out_in_one_setting(recipe: Path) -> None:
    config = load_config(recipe, ["ppo.critic=false"])
    assert config.ppo is not None and config.ppo.advantage.kind == "reinforce"


def test_they_are_all_here() -> None:
    assert [recipe.stem for recipe in RECIPES] == ["gpu-24gb", "gpu-80gb", "node-8x80gb", "nodes-4x8x80gb"]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_it_fits_on_the_cluster_that_it_names(recipe: Path) -> None:
    named = re.search(r"^# Cluster: (\S+)$", recipe.read_text(), re.MULTILINE)
    assert named is not None
    assert recipe.read_text().count(named[1]) == 2, "the command in the header plans for the same cluster"
    config = load_config(recipe)
    assert config.name == recipe.stem
    reports, _ = plan_stages(config, Cluster.parse(named[1]))
    for report in reports:
        assert isinstance(report.memory, MemoryEstimate)
        assert not report.memory.missing, report.plan.stage
        assert not report.memory.warnings
        assert all(place.size is not None for place in report.memory.places)
