"""A run's folder."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from configs import RunConfig, load_config
from orchestrator.preflight.auto_dtype import with_chosen_dtype
from orchestrator.report.history import history
from orchestrator.run.run_dir import Run, RunError
from orchestrator.storage.atomic_files import atomic_directory
from placement import Cluster, resolve
from placement.types import Stage

HOLD = """
import sys, time
from pathlib import Path
from configs import RunConfig
from orchestrator.preflight.auto_dtype import with_chosen_dtype
from orchestrator.run.run_dir import Run
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
        with pytest.raises(RunError, match="another process is running this run"), run.locked():
            pass
    finally:
        other.kill()
        other.wait()
    with run.locked():  # whoever held it is dead: its lock is gone with it
        pass


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), atomic_directory(tmp_path / "x") as folder:
        (folder / "half").touch()
        raise ZeroDivisionError
    assert not (tmp_path / "x").exists()
    with atomic_directory(tmp_path / "x") as folder:
        (folder / "whole").touch()
    assert [p.name for p in (tmp_path / "x").iterdir()] == ["whole"]


LINKS = ["checkpoints", "checkpoints/ppo", "models/sft", "metrics.jsonl", "report.html.partial", ".lock", "evaluation"]


@pytest.mark.parametrize("place", LINKS)
def test_a_link_out_of_the_folder_is_refused(tmp_path: Path, place: str) -> None:
    """A run's folder may come from somebody else: what is written in it stays in it."""
    config = RunConfig.model_validate({"name": "a", "model": {"path": "m"}, "runs": str(tmp_path)})
    Run.begin(config, ["sft"]).save()
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
    run.save()
    (run.folder / "logs").symlink_to("/")
    (run.folder / "models").mkdir()
    Run.open(run.folder)


def test_a_whole_folder_replaces_a_link_and_leaves_what_it_led_to(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").touch()
    for name in ("x", "x.partial", "x.old"):
        (tmp_path / name).symlink_to(outside)
    with atomic_directory(tmp_path / "x") as folder:
        (folder / "new").touch()
    assert not (tmp_path / "x").is_symlink()
    assert [path.name for path in outside.iterdir()] == ["kept"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["outside", "x"]


# ---------------------------------------------------------------- other settings


ADAM = {"lr": 1e-4}
STAGED = {
    "name": "a",
    "model": {"path": "m"},
    "sft": {"train": {"path": "a.jsonl"}, "optimizer": ADAM},
    "rm": {"train": {"path": "b.jsonl"}, "optimizer": ADAM},
    "ppo": {"prompts": {"path": "c.jsonl"}, "steps": 9, "actor_optimizer": ADAM, "critic_optimizer": ADAM},
}


def staged(folder: Path, *overrides: str) -> RunConfig:
    return load_config(STAGED | {"runs": str(folder)}, overrides)


def record(run: Run, stage: Stage, steps: int = 1, finished: bool = False) -> None:
    """What a stage leaves that has done so many steps, the last one with a checkpoint, or that is finished."""
    with (run.folder / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps({"stage": stage, "step": k, "time": 0.0}) + "\n" for k in range(1, steps + 1))
    if finished:
        run.model(stage).mkdir(parents=True)
    elif steps:
        run.checkpoint(stage, steps).mkdir(parents=True)


def test_what_changes_results_is_refused_unless_asked_for(tmp_path: Path) -> None:
    run = Run.begin(staged(tmp_path), ["sft"])
    run.save()
    record(run, "sft")
    moved = Run.open(run.folder, ["placement.devices.actor=2", "strategy=zero2"])
    assert moved.config.strategy == "zero2"
    with pytest.raises(RunError, match=r"other settings.*--accept-changes\n  seed: 1 in the run, 2 now$"):
        Run.open(run.folder, ["seed=2"])
    assert Run.open(run.folder, ["seed=2"], accept_changes=True).config.seed == 2


WAYS = {
    "a command": lambda folder, *overrides: Run.begin(staged(folder, *overrides), ["sft"], accept_changes=True),
    "all stages": lambda folder, *overrides: Run.begin(
        staged(folder, *overrides), ("sft", "rm", "ppo"), accept_changes=True
    ),
    "resume": lambda folder, *overrides: Run.open(folder / "a", overrides, accept_changes=True),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("change", ["sft.epochs=8", "seed=2", "model.lora.rank=8", "chat_template=true", "sft=none"])
def test_what_a_finished_stage_was_run_with_stays(tmp_path: Path, way: str, change: str) -> None:
    """Also with --accept-changes: config.yaml says what the models in the folder were made with."""
    run = Run.begin(staged(tmp_path), ["sft", "rm"])
    run.save()
    record(run, "sft", 4, finished=True)
    record(run, "rm", 2)
    before = (run.folder / "config.yaml").read_text()
    with pytest.raises(RunError) as caught:
        WAYS[way](tmp_path, change)
    first, *changes = str(caught.value).splitlines()
    assert first == (
        f"{run.folder}: has finished (sft) with other settings, which config.yaml keeps. To train with the new settings choose "
        f"another name; with start_from={run.folder} the new run uses this run's models of the stages that it does not run "
        f"itself, with model.path={run.folder}/models/sft it trains that model further"
    )
    assert [line.split(":")[0].strip() for line in changes] in ([change.partition("=")[0]], ["model.lora"])
    assert (run.folder / "config.yaml").read_text() == before
    assert WAYS[way](tmp_path, "checkpoint.every=1", "ppo.steps=3").config.checkpoint.every == 1, "what is free is free"


def test_settings_of_the_stages_that_a_finished_one_started_from_stay_too(tmp_path: Path) -> None:
    """Where somebody has removed a model to train it anew: another stage was trained on it."""
    run = Run.begin(staged(tmp_path), ["sft", "rm"])
    run.save()
    for stage in run.stages:
        record(run, stage, finished=True)
    run.model("sft").rmdir()
    with pytest.raises(
        RunError, match=r"has finished \(rm\) with other settings(.|\n)*sft.epochs: 1.0 in the run, 8.0 now"
    ):
        Run.begin(staged(tmp_path, "sft.epochs=8"), ["sft"], accept_changes=True)


def test_demonstrations_that_other_stages_borrow_are_theirs_too(tmp_path: Path) -> None:
    run = Run.begin(staged(tmp_path), ["rm"])
    run.save()
    record(run, "rm", finished=True)
    assert Run.begin(staged(tmp_path, "sft.epochs=8"), ["sft"]).config.sft.epochs == 8  # type: ignore[union-attr]
    with pytest.raises(RunError, match=r"\n  sft.train.path: 'a.jsonl' in the run, 'z.jsonl' now$"):
        Run.begin(staged(tmp_path, "sft.train.path=z.jsonl"), ["sft"], accept_changes=True)


def test_a_change_in_the_middle_of_a_stage_is_noted(tmp_path: Path) -> None:
    run = Run.begin(staged(tmp_path), ["ppo"])
    run.save()
    record(run, "ppo", 4)
    changed = Run.open(run.folder, ["ppo.gae_lambda=0.9", "seed=2"], accept_changes=True)
    changed.save()
    assert Run.open(run.folder).changes == [
        {"stage": "ppo", "after": 4, "settings": {"ppo.gae_lambda": [0.95, 0.9], "seed": [1, 2]}}
    ]
    assert history(run.folder) == {"Settings changed": "ppo after step 4: ppo.gae_lambda 0.95 -> 0.9, seed 1 -> 2"}
    Run.open(run.folder).save()
    assert len(Run.open(run.folder).changes) == 1, "it is kept, and once"


def test_a_stage_that_begins_anew_was_not_changed_on_the_way(tmp_path: Path) -> None:
    """Without a checkpoint nothing is left of what the other settings did."""
    run = Run.begin(staged(tmp_path), ["sft"])
    run.save()
    record(run, "sft", 3)
    run.checkpoint("sft", 3).rmdir()
    assert Run.begin(staged(tmp_path, "seed=2"), ["sft"], accept_changes=True).changes == []


@pytest.mark.parametrize("override", ["name=b", "runs=elsewhere"])
def test_resume_goes_on_in_the_folder_that_is_named(tmp_path: Path, override: str) -> None:
    run = Run.begin(staged(tmp_path), ["sft"])
    run.save()
    with pytest.raises(RunError, match=rf"^{override.partition('=')[0]}: was '\w+', but the run stays in its folder"):
        Run.open(run.folder, [override], accept_changes=True)
    run.folder.rename(tmp_path / "b")
    assert Run.open(tmp_path / "b").config.name == "a", "a folder may be renamed"
    record(Run.open(tmp_path / "b"), "sft")
    assert Run.begin(staged(tmp_path, "name=b"), ["sft"]).config.name == "b"


def test_notes_of_others_in_run_json_are_kept(tmp_path: Path) -> None:
    run = Run.begin(staged(tmp_path), ["sft"])
    run.save()
    run.write("run.json", run.read("run.json") | {"elsewhere": "noted"})
    run.save()
    assert run.read("run.json")["elsewhere"] == "noted"


# ---------------------------------------------------------------- strategy: auto


GPU = Cluster.parse("1x1xA100-80GB,host=64GB")


def automatic(folder: Path, strategy: str = "auto") -> RunConfig:
    section = {"train": {"path": "rows.jsonl"}, "optimizer": {"lr": 1e-4}}
    return RunConfig.model_validate(
        {"name": "a", "runs": str(folder), "model": {"path": "preset:s"}, "strategy": strategy, "sft": section}
    )


def test_what_auto_became_is_noted_and_kept(tmp_path: Path) -> None:
    run = Run.begin(automatic(tmp_path), ["sft"])
    run.save()
    config, why = with_chosen_dtype(run.config, GPU)
    assert run.record_resolved(resolve(config, ["sft"], GPU), why) == [
        "model.dtype: auto is bfloat16: on GPUs",
        "strategy: auto is ddp for the actor, ddp for the critic, ddp for the reference, ddp for the reward",
    ]
    assert run.read("run.json")["dtype"] == {"is": "bfloat16", "why": "on GPUs"}
    assert run.config.strategy == Run.open(run.folder).config.strategy == "ddp"
    assert run.config.model.dtype == Run.open(run.folder).config.model.dtype == "bfloat16"
    assert with_chosen_dtype(run.config, GPU) == (run.config, None)
    assert run.record_resolved(run.config, None) == [], "all are named"
    assert Run.begin(automatic(tmp_path), ["sft"]).config.strategy == "auto", "nothing has begun: it may change"
    line = {"stage": "sft", "step": 1, "metrics": {}, "time": 0.0}
    (run.folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    again = Run.begin(automatic(tmp_path), ["sft"]).config
    assert (again.strategy, again.model.dtype) == ("ddp", "bfloat16"), "the run goes on as it began"
    assert Run.open(run.folder).config.strategy == "ddp"
    assert Run.begin(automatic(tmp_path, "zero1"), ["sft"]).config.strategy == "zero1", "asked for by name"
