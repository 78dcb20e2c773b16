"""A run in which one process serves actor, critic, reference and reward model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from orchestrator import Result, load_config, run_stages
from orchestrator.storage.metrics_file import repeatable as lines
from placement.cluster import Cluster
from tests.support.dying import fault
from tests.support.runs import assert_same_model, begun

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SETTINGS = (
    "name=shared",
    "model.lora.rank=4",
    "shared_base=[actor,critic,reference,reward]",
    "recovery.snapshot_every=2",
    "sft.epochs=1",
    "ppo.steps=4",
)


@pytest.fixture(scope="module")
def quiet(micro: Path, ray_here: Cluster) -> Result:
    return run_stages(load_config(micro, list(SETTINGS)))


def test_the_four_roles_are_one_process(quiet: Result) -> None:
    workers = json.loads((quiet.folder / "status.json").read_text())["workers"]
    pids = {worker["role"]: worker["pid"] for worker in workers}
    assert len(pids) == 5
    assert len(set(pids.values())) == 2


def test_all_roles_of_a_killed_process_are_replaced(micro: Path, quiet: Result, tmp_path: Path) -> None:
    fault(tmp_path, "critic-0", "backward", 7)  # in the fourth step, after the snapshot
    folder = begun(quiet, tmp_path, ("ppo",))
    run_stages(load_config(micro, [*SETTINGS, f"runs={tmp_path}"]), ["ppo"])
    assert not list((tmp_path / "faults").iterdir()), "every fault has happened"
    assert lines(folder, "ppo") == lines(quiet.folder, "ppo")
    assert_same_model(folder / "models" / "ppo", quiet.models["ppo"])
    assert len(list((folder / "failures").glob("*.txt"))) == 1
