"""The driver killed at moments drawn at random, in all three stages: the run that was resumed is the run."""

from __future__ import annotations

import os
import random
import subprocess
import time
from pathlib import Path

import pytest

from orchestrator import Result
from orchestrator.condition import Condition
from orchestrator.metrics import repeatable as lines
from orchestrator.run import Run
from orchestrator.sessions import stage_seconds
from placement.shape import Stage
from tests.runs import ROOT, TWO_ENGINES, assert_same_model, command

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

ORDER: tuple[Stage, ...] = ("sft", "rm", "ppo")
KILLED_IN: tuple[Stage, ...] = ("sft", "rm", "ppo")
MOMENT: dict[Stage, float] = {"sft": 0.15, "rm": 0.15, "ppo": 0.8}
"""Seconds, at most, from the record of a step to the kill: about three steps. PPO's first record comes before its first step."""


def test_the_driver_killed_at_random(micro: Path, whole: Result) -> None:
    import ray

    environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    draw = random.Random(7)
    folder = whole.folder.parent / "killed"
    settings = (TWO_ENGINES, "checkpoint.every=1", "name=killed")
    stages: list[str] = []
    for stage in KILLED_IN:
        begin = command("pipeline", str(micro), *settings)
        process = subprocess.Popen(begin, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        written = size(folder)
        while process.poll() is None and (size(folder) == written or ORDER.index(at(folder)) < ORDER.index(stage)):
            time.sleep(0.02)
        time.sleep(draw.uniform(0.0, MOMENT[stage]))
        process.kill()
        output, _ = process.communicate()
        assert process.returncode == -9, output.decode()
        stages.append(at(folder))
        assert Condition.of(Run.open(folder)).state in ("killed", "stopped")  # or between two stages
    spent = sum(stage_seconds(folder).values())
    done = subprocess.run(command("resume", str(folder)), cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for stage in ORDER:
        assert lines(folder, stage) == lines(whole.folder, stage), f"{stage}; killed in {stages}"
        assert_same_model(folder / "models" / stage, whole.models[stage])
    assert {*stages} == {*ORDER}, f"killed in {stages}"
    kept = Path("samples") / "ppo.jsonl"
    assert (folder / kept).read_text() == (whole.folder / kept).read_text(), "no step stands there twice"
    seconds = stage_seconds(folder)
    assert sum(seconds.values()) > spent, "of sessions whose driver was killed, too"


def size(folder: Path) -> int:
    metrics = folder / "metrics.jsonl"
    return metrics.stat().st_size if metrics.exists() else 0


def at(folder: Path) -> Stage:
    """The stage that a run is in."""
    return next(stage for stage in ORDER if not (folder / "models" / stage).exists())
