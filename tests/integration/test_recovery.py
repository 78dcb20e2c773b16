"""Real workers are killed or stopped during a run: the run goes on, and its result is that of a run without failures."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import numpy as np
import pytest

from orchestrator import Result, WorkerError, load_config, run_stages
from orchestrator.algorithms.runner import SkippedStepsError
from orchestrator.periodic import Repeating
from orchestrator.storage.metrics_file import repeatable as lines
from placement.types import Stage
from tests.support.dying import fault
from tests.support.runs import TWO_ENGINES, assert_same_model, begun

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SETTINGS = (
    TWO_ENGINES,
    "recovery.snapshot_every=2",
    "recovery.max_restarts=9",
)


STAGES = ("sft", "rm", "ppo")


def run(micro: Path, whole: Result, folder: Path, stage: Stage, *overrides: str) -> Path:
    """A stage from the models of the whole run, with faults; its folder."""
    if at := STAGES.index(stage):
        begun(whole, folder, STAGES[at:])
    return run_stages(load_config(micro, [*SETTINGS, f"runs={folder}", *overrides]), [stage]).folder


def records(folder: Path) -> list[str]:
    return [path.read_text() for path in sorted((folder / "failures").glob("*.txt"))]


PPO_FAULTS = [
    ("rollout-0", "generate", 12),  # in the evaluation before the first step
    ("actor-0", "forward", 2),  # in the first step: there is no snapshot yet
    ("actor-0", "sync_weights", 2),
    ("reward-0", "score", 5),
    ("critic-0", "backward", 7),
]
"""Faults of a role happen one after the other, each in the process that replaces the last. More: `benchmarks.chaos`."""


@pytest.mark.long
def test_ppo_is_as_without_the_faults(micro: Path, whole: Result, tmp_path: Path) -> None:
    for who, point, count in PPO_FAULTS:
        fault(tmp_path, who, point, count)
    folder = run(micro, whole, tmp_path, "ppo")
    assert not list((tmp_path / "faults").iterdir()), "every fault has happened"
    assert lines(folder, "ppo") == lines(whole.folder, "ppo")
    assert_same_model(folder / "models" / "ppo", whole.models["ppo"])
    assert len(records(folder)) == len(PPO_FAULTS)
    kept = Path("samples") / "ppo.jsonl"
    assert (folder / kept).read_text() == (whole.folder / kept).read_text(), "no step is there twice"


def test_stopped_processes_are_found_by_their_deadline(micro: Path, whole: Result, tmp_path: Path) -> None:
    fault(tmp_path, "rollout-0", "generate", 12, signal.SIGSTOP)
    fault(tmp_path, "actor-0", "backward", 6, signal.SIGSTOP)
    waited: set[tuple[str, str, str, int]] = set()

    def look() -> None:
        path = tmp_path / "micro" / "status.json"
        if path.exists() and (awaited := json.loads(path.read_text()).get("awaited")):
            seconds = round(awaited["until"] - awaited["since"])
            waited.add((awaited["role"], awaited["method"], awaited["setting"], seconds))

    looking = Repeating(look, 0.5)
    folder = run(micro, whole, tmp_path, "ppo", "deadlines.generate=10", "deadlines.train=10")
    looking.stop()
    assert waited >= {
        ("rollout", "generate", "deadlines.generate", 10),
        ("actor", "train_answers", "deadlines.train", 10),
    }, "`troupe status` shows it during the hang"
    assert lines(folder, "ppo") == lines(whole.folder, "ppo")
    engine, actor = records(folder)
    assert "rollout rank 0: no reply to generate in 10 s (deadlines.generate)" in engine
    assert "process stopped" in engine
    assert "_Dying.reach (dying_workers.py" in actor, "its stack"


def test_supervised_stages_are_as_without_the_faults(micro: Path, whole: Result, tmp_path: Path) -> None:
    """At the end the export fails: the trained state is kept, and a resumed run only exports it."""
    fault(tmp_path, "actor-0", "backward", 8)
    fault(tmp_path, "actor-0", "save", 1)
    fault(tmp_path, "actor-0", "export", 1, 0)
    with pytest.raises(
        WorkerError, match=r"^actor rank 0 failed in export: ValueError: this model cannot be written\n"
    ):
        run(micro, whole, tmp_path, "sft")
    folder = tmp_path / "micro"
    assert not list((tmp_path / "faults").iterdir())
    assert [path.name for path in (folder / "checkpoints" / "sft").iterdir()] == ["12"]
    assert [text.splitlines()[1].partition(":")[0] for text in records(folder)] == ["save", "train", "save"]
    trained = lines(folder, "sft")
    run(micro, whole, tmp_path, "sft")
    assert lines(folder, "sft") == trained == lines(whole.folder, "sft")
    assert_same_model(folder / "models" / "sft", whole.models["sft"])
    numbers = json.loads((folder / "summary.json").read_text())["stages"]["sft"]
    assert {k: v for k, v in numbers.items() if k != "seconds"} == {
        k: v for k, v in whole.numbers["sft"].items() if k != "seconds"
    }
    assert not list(folder.glob("checkpoints/*/*"))


def test_a_fault_that_comes_again_ends_the_run(micro: Path, whole: Result, tmp_path: Path) -> None:
    fault(tmp_path, "reward-0", "score", 1)
    with pytest.raises(
        WorkerError,
        match=r"not replaced again: at most 0 restarts in 3600 s, or in one step, are allowed \(recovery\.max_restarts",
    ):
        run(micro, whole, tmp_path, "ppo", "recovery.max_restarts=0")


def test_a_step_that_is_not_finite_is_not_applied_and_two_in_a_row_end_the_run(
    micro: Path, whole: Result, tmp_path: Path
) -> None:
    for count in (3, 4, 7, 8, 9, 10):  # both mini-batches of the second, fourth and fifth step
        fault(tmp_path, "actor-0", "loss", count, 0)
    with pytest.raises(
        SkippedStepsError, match=r"^ppo, step 5: optimizer steps were skipped in 2 steps in a row \(recovery\."
    ):
        run(micro, whole, tmp_path, "ppo", "recovery.max_skipped_steps=2")
    folder = tmp_path / "micro"
    metrics = lines(folder, "ppo")
    assert [line["skipped/actor"] for line in metrics[1:]] == [0, 2, 0, 2]
    assert [line["policy_version"] for line in metrics[1:]] == [0, 1, 1, 2], (
        "a skipped step changes no weights: nothing to publish"
    )
    assert metrics[1] == lines(whole.folder, "ppo")[1]
    batches = {path.name: path for path in (folder / "failures").glob("*.npz")}
    assert batches.keys() == {f"ppo-{step}-skipped-actor-0.npz" for step in (2, 4, 5)}
    assert {"ids", "offsets", "prompt_lengths"} <= set(np.load(batches["ppo-2-skipped-actor-0.npz"]).files)
    assert not (folder / "models" / "ppo").exists()
