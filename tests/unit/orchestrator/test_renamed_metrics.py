"""Metrics that were recorded under names that they had before."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from orchestrator.loggers.ray_table import TABLE
from orchestrator.storage import metrics_file
from orchestrator.storage.metrics_file import FILE, RENAMED_METRICS, AppendedFile, read_metrics


def test_lines_with_old_names_are_read_with_new_ones_and_stay_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics_file, "RENAMED_METRICS", {"old": "new", "a/old": "a/new"})
    lines = [
        {"stage": "ppo", "step": 1, "old": 1.0, "a/old": None},
        {"stage": "ppo", "step": 2, "new": 2.0, "older": 3.0},
    ]
    path = tmp_path / FILE
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    before = path.read_bytes()
    assert read_metrics(tmp_path) == [{"stage": "ppo", "step": 1, "new": 1.0, "a/new": None}, lines[1]]
    AppendedFile(path).cut(lambda line: True)
    assert path.read_bytes() == before, "a run that is resumed keeps its lines"


def test_no_old_name_is_recorded() -> None:
    recorded = {row.metric for row in TABLE}
    assert not recorded & RENAMED_METRICS.keys()
    assert not RENAMED_METRICS.keys() & set(RENAMED_METRICS.values())
