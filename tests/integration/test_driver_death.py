"""The driver is killed at random moments, in both kinds of stages: the resumed run has the results of an uninterrupted one. For
more kills: `python -m benchmarks.chaos`."""

from __future__ import annotations

import os
import random
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from orchestrator import Result
from orchestrator.run.condition import Condition
from orchestrator.run.run_dir import Run
from orchestrator.run.sessions import stage_seconds
from orchestrator.storage.metrics_file import repeatable as lines
from placement.types import Stage
from tests.support.runs import ROOT, TWO_ENGINES, assert_same_model, command, flip_bit

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(1800)]

ORDER: tuple[Stage, ...] = ("sft", "rm", "ppo")
KILLED_AFTER: dict[Stage, int] = {"sft": 3, "ppo": 4}
"""Records of the stage; PPO's first comes before its first step."""
MOMENT: dict[Stage, float] = {"sft": 0.1, "ppo": 0.5}
"""Seconds, at most, from the record to the kill."""


def test_the_driver_killed_at_random(micro: Path, whole: Result) -> None:
    """At the end the newest checkpoint is damaged too, and the one before is used."""
    import ray

    environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    draw = random.Random(7)
    folder = whole.folder.parent / "killed"
    settings = (TWO_ENGINES, "checkpoint.every=1", "checkpoint.keep=2", "name=killed")
    for stage, step in KILLED_AFTER.items():
        begin = command("pipeline", str(micro), *settings)
        process = subprocess.Popen(begin, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        while process.poll() is None and len(recorded(folder, stage)) < step:
            time.sleep(0.02)
        time.sleep(draw.uniform(0.0, MOMENT[stage]))
        process.kill()
        output, _ = process.communicate()
        assert process.returncode == -9, output.decode()
        assert at(folder) == stage
        assert Condition.of(Run.open(folder)).state == "killed"
    spent = sum(stage_seconds(folder).values())
    kept = sorted(int(path.name) for path in (folder / "checkpoints" / "ppo").iterdir() if path.name.isdecimal())
    assert len(kept) == 2
    newest = folder / "checkpoints" / "ppo" / str(kept[-1])
    flip_bit(next(newest.glob("actor/**/*.pt")))
    done = subprocess.run(command("resume", str(folder)), cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"warning:{newest}:damaged,sothepreviousoneisused" in "".join(done.stdout.split())  # lines are wrapped
    assert f"resuming after step {kept[0]}" in done.stdout
    assert "finished before: sft, rm" in done.stdout
    assert "killed is finished" in done.stdout and done.stderr == ""
    for stage in ORDER:
        assert lines(folder, stage) == lines(whole.folder, stage), stage
        assert_same_model(folder / "models" / stage, whole.models[stage])
    answers = Path("samples") / "ppo.jsonl"
    assert (folder / answers).read_text() == (whole.folder / answers).read_text(), "no step is there twice"
    assert sum(stage_seconds(folder).values()) > spent, "of sessions whose driver was killed, too"


def recorded(folder: Path, stage: Stage) -> list[dict[str, Any]]:
    return lines(folder, stage) if (folder / "metrics.jsonl").exists() else []


def at(folder: Path) -> Stage:
    """The stage that a run is in."""
    return next(stage for stage in ORDER if not (folder / "models" / stage).exists())
