"""What a run records step by step: metrics.jsonl, TensorBoard events, sampled answers, and metrics on Ray's port."""

from __future__ import annotations

import io
import json
import math
import os
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from orchestrator.loggers.ray_metrics import RayMetrics
from orchestrator.storage.atomic_files import DiskError
from orchestrator.storage.metrics_file import FILE, SAMPLES, AppendedFile

RESERVED = ("stage", "step", "time")


class Recorder:
    """Writes the metrics of one stage of a run; one process at a time writes to a run folder.

    What a full disk keeps from being written is written with the next step's, once there is space.

    Args:
        folder: The run's folder; made where it does not exist.
        run: Name of the run, a label of the metrics on Ray's port.
        stage: sft, rm or ppo.
        resume_step: The stage goes on after this step: its lines of later steps are dropped, so that they are not there
            twice. None: the stage begins anew, and all of its earlier lines are dropped. Other stages' lines stay.

    Raises:
        DiskError: the disk is full or fails.
    """

    def __init__(self, folder: Path, run: str, stage: str, resume_step: int | None = None) -> None:
        self._path = folder / FILE
        self._stage = stage
        # TensorBoard wants to know where a run begins anew; it then drops what stands from that step on in the same
        # folder, whatever the tag: hence a folder for each stage.
        board = folder / "tensorboard" / stage
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        last_step = -1 if resume_step is None else resume_step
        self._lines, self._events = AppendedFile(self._path), AppendedFile(board / name)
        self._samples = AppendedFile(folder / SAMPLES / f"{stage}.jsonl")
        self._most_sample_bytes: int | None = None
        self._cut_after(last_step)
        self._events.add(0, _record(Event(wall_time=time.time(), file_version="brain.Event:2")))
        self._begin_after(last_step)
        self.ray = RayMetrics(run, stage)
        """What Ray's metrics port shows of this stage."""

    def record(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write one line, `{"stage", "step", "time", **metrics}`, and the same to TensorBoard and to Ray.

        JSON has no NaN or infinity: they become null in metrics.jsonl. TensorBoard shows them as they are; Ray leaves a
        gauge out of its port while it has no finite value.

        Raises:
            ValueError: a metric is named stage, step or time.
            DiskError: the disk is full or fails. The files end with the last step that was written whole.
        """
        for name in RESERVED:
            if name in metrics:
                raise ValueError(f"metric {name!r}: the name is taken by the line's own fields {', '.join(RESERVED)}")
        now = time.time()
        values = {name: float(value) for name, value in metrics.items()}
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        line = {"stage": self._stage, "step": step, "time": round(now, 3), **finite}
        scalars = [Summary.Value(tag=f"{self._stage}/{name}", simple_value=value) for name, value in values.items()]
        self._lines.add(step, (json.dumps(line, allow_nan=False) + "\n").encode())
        self._events.add(step, _record(Event(wall_time=now, step=step, summary=Summary(value=scalars))))
        self.ray.record(step, values)
        self._flush()

    def keep_answers(self, step: int, answers: Sequence[Mapping[str, Any]], most_bytes: int) -> None:
        """Write `{"step", **answer}` to samples/<stage>.jsonl for each of a step's answers, with the step's next metrics.

        Where the file grows beyond `most_bytes`, its oldest steps are dropped.
        """
        self._most_sample_bytes = most_bytes
        for answer in answers:
            line = json.dumps({"step": step, **answer}, ensure_ascii=False, allow_nan=False)
            self._samples.add(step, (line + "\n").encode())

    def rewind(self, step: int) -> None:
        """Forget this stage's steps after `step`, which are about to be done again. Raises DiskError."""
        for file in (self._lines, self._events, self._samples):
            file.forget_after(step)
        self._cut_after(step)
        self._begin_after(step)

    def close(self) -> None:
        """Raises DiskError where something is left that cannot be written."""
        try:
            self._flush()
        finally:
            self.ray.close()
            for file in (self._lines, self._events, self._samples):
                file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except DiskError:
            if error is None:  # else the error that ended the block says more
                raise

    def _begin_after(self, step: int) -> None:
        start = SessionLog(status=SessionLog.START)
        self._events.add(step, _record(Event(wall_time=time.time(), step=step + 1, session_log=start)))
        self._flush()

    def _cut_after(self, step: int) -> None:
        """Drop this stage's lines of later steps, and torn last lines."""
        self._lines.cut(lambda line: line["stage"] != self._stage or line["step"] <= step)
        self._samples.cut(lambda line: line["step"] <= step)

    def _flush(self) -> None:
        for file in (self._lines, self._events, self._samples):
            file.flush()
        if self._most_sample_bytes is not None:
            self._samples.drop_oldest(self._most_sample_bytes)


def _record(event: Event) -> bytes:
    """An event as it stands in TensorBoard's files. Written by itself: their writer's thread prints a traceback when the
    disk is full, and leaves half a record, after which nothing can be read."""
    file = io.BytesIO()
    RecordWriter(file).write(event.SerializeToString())
    return file.getvalue()
