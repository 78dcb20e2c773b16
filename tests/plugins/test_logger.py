"""A logger of one's own (tests/plugins/logger.py) in a run that is killed and resumed, beside loggers that raise.

The runs are processes of their own: what a plugin adds to the settings stays added.
"""

from __future__ import annotations

import math
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import ray

from orchestrator.storage.metrics_file import read_metrics
from placement import Cluster
from tests.support.runs import ROOT, command, wait_for

PLUGINS = "plugins=[tests.plugins.logger, tests.support.failing_logger]"


def table(path: Path) -> list[tuple[int, str, float]]:
    rows = [line.split(",") for line in path.read_text().splitlines()]
    return [(int(step), metric, float(value)) for step, metric, value in rows]


def record(folder: Path) -> list[tuple[int, str, float]]:
    return [
        (line["step"], name, math.nan if value is None else value)
        for line in read_metrics(folder)
        for name, value in line.items()
        if name not in ("stage", "step", "time")
    ]


@pytest.mark.slow
def test_a_logger_goes_on_after_a_kill_and_one_that_raises_stops_nothing(
    micro: Path, tmp_path: Path, ray_here: Cluster
) -> None:
    folder = tmp_path / "micro"
    loggers = "loggers=[{kind: csv, file: table.csv}, {kind: failing}, {kind: failing, from_start: true}]"
    run = ["sft", str(micro), PLUGINS, loggers, f"runs={tmp_path}", "sft.epochs=20", "checkpoint.every=5"]
    options: dict[str, Any] = {
        "cwd": ROOT,
        "env": os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address},
        "text": True,
    }
    killed = subprocess.Popen(command(*run), stdout=subprocess.DEVNULL, **options)
    wait_for(lambda: len(read_metrics(folder)) >= 8)
    killed.kill()
    killed.wait()
    assert {step for step, _, _ in table(folder / "sft-table.csv")} >= set(range(1, 8))

    resumed = subprocess.run(command("resume", str(folder)), capture_output=True, check=True, **options)
    assert table(folder / "sft-table.csv") == record(folder)
    assert sorted({step for step, _, _ in record(folder)}) == list(range(1, 61))
    assert not (folder / "tensorboard").exists(), "it was not among the loggers"
    assert "tensorboard" not in resumed.stdout
    warnings = [line for line in resumed.stdout.splitlines() if "warning: loggers" in line]
    assert len(warnings) == 2, "one for each logger that fails"
    assert warnings[0].startswith("warning: loggers.2 (failing): OSError: no service there; the run continues")
    assert "loggers.1 (failing): OSError: the service is gone in step" in warnings[1]
    failures = [path.read_text() for path in (folder / "failures").iterdir()]
    assert len([text for text in failures if "in log\n" in text and "Traceback" in text]) == 2, "one for each session"


def test_settings_of_a_plugin_are_checked_like_others(micro: Path) -> None:
    loggers = "loggers=[{kind: csv, fil: x}, {kind: cvs}]"
    shown = subprocess.run(
        command("sft", str(micro), PLUGINS, loggers), cwd=ROOT, capture_output=True, text=True
    ).stderr
    assert "loggers.0.fil: no such setting; did you mean file?" in shown
    assert 'loggers.1.kind: was "cvs"; must be tensorboard | ray | csv | failing' in shown
