"""The record of a run: metrics.jsonl and the sampled responses."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.loggers.base import LoggedStage, Logger
from orchestrator.storage.metrics_file import FILE, SAMPLES, AppendedFile


class JsonlLogger(Logger):
    """Writes metrics.jsonl and samples/<stage>.jsonl in the run's folder, which is created if needed.

    Resume, recovery and report read these files, so this logger is always active and not in `loggers`. All methods raise
    DiskError if the disk is full or fails; the files then end with the last complete step, and the missing lines are written
    with the next step.
    """

    def __init__(self, stage: LoggedStage) -> None:
        super().__init__(None, stage)
        self._lines = AppendedFile(stage.folder / FILE)
        self._samples = AppendedFile(stage.folder / SAMPLES / f"{stage.name}.jsonl")
        self._most_sample_bytes: int | None = None

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write one line, `{"stage", "step", "time", **metrics}`. JSON has no NaN or infinity: they become null."""
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        line = {"stage": self.stage.name, "step": step, "time": round(time.time(), 3), **finite}
        self._lines.add(step, (json.dumps(line, allow_nan=False) + "\n").encode())
        self._flush()

    def keep_answers(self, step: int, answers: Sequence[Mapping[str, Any]], most_bytes: int) -> None:
        """Write `{"step", **answer}` for each of a step's responses, with the step's next metrics. If the file grows beyond
        `most_bytes`, its oldest steps are dropped."""
        self._most_sample_bytes = most_bytes
        for answer in answers:
            line = json.dumps({"step": step, **answer}, ensure_ascii=False, allow_nan=False)
            self._samples.add(step, (line + "\n").encode())

    def rewind(self, step: int) -> None:
        """Drop this stage's lines of later steps, and incomplete last lines. Other stages' lines stay."""
        for file in (self._lines, self._samples):
            file.forget_after(step)
        self._lines.cut(lambda line: line["stage"] != self.stage.name or line["step"] <= step)
        self._samples.cut(lambda line: line["step"] <= step)
        self._flush()

    def close(self) -> None:
        try:
            self._flush()
        finally:
            for file in (self._lines, self._samples):
                file.close()

    def _flush(self) -> None:
        for file in (self._lines, self._samples):
            file.flush()
        if self._most_sample_bytes is not None:
            self._samples.drop_oldest(self._most_sample_bytes)
