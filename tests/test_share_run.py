"""A run in which one process serves actor, critic, reference and reward model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from orchestrator import Result, load_config, run_stages
from orchestrator.metrics import repeatable as lines
from placement.cluster import Cluster
from tests.dying import fault
from tests.micro import write_micro
from tests.runs import assert_same_model, begun

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SETTINGS = (
    "model.lora.rank=4",
    "share=[actor,critic,reference,reward]",
    "plugins=[tests.dying]",
    "recovery.snapshot_every=2",
    "sft.epochs=1",
    "ppo.steps=4",
)


@pytest.fixture(scope="module")
def micro(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_micro(tmp_path_factory.mktemp("micro"))


@pytest.fixture(scope="module")
def quiet(micro: Path, ray_here: Cluster) -> Result:
    return run_stages(load_config(micro, list(SETTINGS)))


def again(micro: Path, quiet: Result, folder: Path, *overrides: str) -> Path:
    """PPO from the models of the quiet run; its folder."""
    copy = begun(quiet, folder, ("ppo",))
    run_stages(load_config(micro, [*SETTINGS, f"runs={folder}", *overrides]), ["ppo"])
    return copy


def test_the_four_roles_are_one_process(quiet: Result) -> None:
    workers = json.loads((quiet.folder / "status.json").read_text())["workers"]
    pids = {worker["role"]: worker["pid"] for worker in workers}
    assert len(pids) == 5
    assert len(set(pids.values())) == 2


def test_a_killed_process_takes_all_its_roles_and_all_come_back(micro: Path, quiet: Result, tmp_path: Path) -> None:
    fault(tmp_path, "critic-0", "backward", 7)  # in the fourth step, after the snapshot
    fault(tmp_path, "reference-0", "score", 2)
    folder = again(micro, quiet, tmp_path)
    assert not list((tmp_path / "faults").iterdir()), "every fault has happened"
    assert lines(folder, "ppo") == lines(quiet.folder, "ppo")
    assert_same_model(folder / "models" / "ppo", quiet.models["ppo"])
    assert len(list((folder / "failures").glob("*.txt"))) == 2


def test_the_run_is_that_of_the_roles_apart(micro: Path, quiet: Result, tmp_path: Path) -> None:
    apart = again(micro, quiet, tmp_path, "share=[]")
    found, wanted = lines(quiet.folder, "ppo"), lines(apart, "ppo")
    assert len(found) == len(wanted) == 5, "four steps, and the answers before them"
    for a, b in zip(found, wanted, strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-4)
