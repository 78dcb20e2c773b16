"""A run's folder."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from configs import RunConfig
from orchestrator.integrity import whole_folder
from orchestrator.run import Run, RunError
from placement import Cluster, resolve

HOLD = """
import sys, time
from pathlib import Path
from configs import RunConfig
from orchestrator.run import Run
with Run(RunConfig(name="a", model={"path": "m"}), Path(sys.argv[1])).locked():
    print("held", flush=True)
    time.sleep(60)
"""


def test_two_processes_do_not_work_in_one_run(tmp_path: Path) -> None:
    run = Run(RunConfig.model_validate({"name": "a", "model": {"path": "m"}}), tmp_path)
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(RunError, match="another process is at work in this run"), run.locked():
            pass
    finally:
        other.kill()
        other.wait()
    with run.locked():  # whoever held it is dead: its lock is gone with it
        pass


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), whole_folder(tmp_path / "x") as folder:
        (folder / "half").touch()
        raise ZeroDivisionError
    assert not (tmp_path / "x").exists()
    with whole_folder(tmp_path / "x") as folder:
        (folder / "whole").touch()
    assert [p.name for p in (tmp_path / "x").iterdir()] == ["whole"]


LINKS = ["checkpoints", "checkpoints/ppo", "models/sft", "metrics.jsonl", "report.html.partial", ".lock", "evaluation"]


@pytest.mark.parametrize("place", LINKS)
def test_a_link_out_of_the_folder_is_refused(tmp_path: Path, place: str) -> None:
    """A run's folder may come from somebody else: what is written in it stays in it."""
    config = RunConfig.model_validate({"name": "a", "model": {"path": "m"}, "runs": str(tmp_path)})
    Run.begin(config, ["sft"]).keep()
    outside = tmp_path / "outside"
    outside.mkdir()
    link = tmp_path / "a" / place
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(outside)
    for start in (lambda: Run.open(tmp_path / "a"), lambda: Run.begin(config, ["sft"])):
        with pytest.raises(RunError, match=f"{place}: a link to .*/outside, outside of the run's folder"):
            start()
    link.unlink()
    link.symlink_to(link.parent / "within")
    Run.open(tmp_path / "a")


def test_the_link_to_the_logs_and_a_run_behind_a_link_are_fine(tmp_path: Path) -> None:
    (tmp_path / "disk" / "a").mkdir(parents=True)
    (tmp_path / "runs").symlink_to(tmp_path / "disk")
    run = Run(RunConfig.model_validate({"name": "a", "model": {"path": "m"}}), tmp_path / "runs" / "a")
    run.keep()
    (run.folder / "logs").symlink_to("/")
    (run.folder / "models").mkdir()
    Run.open(run.folder)


def test_a_whole_folder_replaces_a_link_and_leaves_what_it_led_to(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").touch()
    for name in ("x", "x.partial", "x.old"):
        (tmp_path / name).symlink_to(outside)
    with whole_folder(tmp_path / "x") as folder:
        (folder / "new").touch()
    assert not (tmp_path / "x").is_symlink()
    assert [path.name for path in outside.iterdir()] == ["kept"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["outside", "x"]


def test_what_changes_results_is_refused_unless_asked_for(tmp_path: Path) -> None:
    base = {"name": "a", "runs": str(tmp_path), "model": {"path": "m"}}
    run = Run.begin(RunConfig.model_validate(base), ["sft"])
    run.keep()
    (run.folder / "metrics.jsonl").write_text('{"stage": "sft", "step": 1, "time": 0, "loss": 1.0}\n')
    moved = Run.open(run.folder, ["placement.devices.actor=2", "strategy=zero2"])
    assert moved.config.strategy == "zero2"
    with pytest.raises(RunError, match=r"other settings.*--accept-changes\n  seed: 1 there, 2 asked for$"):
        Run.open(run.folder, ["seed=2"])
    assert Run.open(run.folder, ["seed=2"], accept_changes=True).config.seed == 2


# ---------------------------------------------------------------- strategy: auto


def automatic(folder: Path, strategy: str = "auto") -> RunConfig:
    section = {"train": {"path": "rows.jsonl"}, "optimizer": {"lr": 1e-4}}
    return RunConfig.model_validate(
        {"name": "a", "runs": str(folder), "model": {"path": "preset:s"}, "strategy": strategy, "sft": section}
    )


def test_what_auto_became_is_noted_and_kept(tmp_path: Path) -> None:
    run = Run.begin(automatic(tmp_path), ["sft"])
    run.keep()
    assert run.chosen(resolve(run.config, ["sft"], Cluster.parse("1x1xA100-80GB,host=64GB"))) == (
        "strategy: auto is ddp for the actor, ddp for the critic, ddp for the reference, ddp for the reward"
    )
    assert run.config.strategy == Run.open(run.folder).config.strategy == "ddp"
    assert run.chosen(run.config) is None, "all are named"
    assert Run.begin(automatic(tmp_path), ["sft"]).config.strategy == "auto", "nothing has begun: it may change"
    line = {"stage": "sft", "step": 1, "metrics": {}, "time": 0.0}
    (run.folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    assert Run.begin(automatic(tmp_path), ["sft"]).config.strategy == "ddp", "the run goes on as it began"
    assert Run.open(run.folder).config.strategy == "ddp"
    assert Run.begin(automatic(tmp_path, "zero1"), ["sft"]).config.strategy == "zero1", "asked for by name"
