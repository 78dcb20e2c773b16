"""Metrics as TensorBoard events."""

from __future__ import annotations

import io
import os
import socket
import time
from collections.abc import Mapping

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from configs.schema import TensorBoardSettings
from orchestrator.loggers.base import LoggedStage, Logger
from orchestrator.storage.metrics_file import AppendedFile

_BEFORE_ALL = -1
"""Step of the events that no rewind drops."""


class TensorBoardLogger(Logger):
    """Writes events to a new file in tensorboard/<stage>/ of the run's folder.

    Methods raise DiskError if the disk is full or fails; the missing events are written with the next step.
    """

    Config = TensorBoardSettings

    def __init__(self, config: TensorBoardSettings, stage: LoggedStage) -> None:
        super().__init__(config, stage)
        # At a START event TensorBoard drops all steps from that step on in the same folder, whatever their tag: so each
        # stage has its own folder.
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        self._events = AppendedFile(stage.folder / "tensorboard" / stage.name / name)
        self._events.add(_BEFORE_ALL, _record(Event(wall_time=time.time(), file_version="brain.Event:2")))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        values = [Summary.Value(tag=f"{self.stage.name}/{name}", simple_value=value) for name, value in metrics.items()]
        self._events.add(step, _record(Event(wall_time=time.time(), step=step, summary=Summary(value=values))))
        self._events.flush()

    def rewind(self, step: int) -> None:
        self._events.forget_after(step)
        start = SessionLog(status=SessionLog.START)
        self._events.add(step, _record(Event(wall_time=time.time(), step=step + 1, session_log=start)))
        self._events.flush()

    def close(self) -> None:
        try:
            self._events.flush()
        finally:
            self._events.close()


def _record(event: Event) -> bytes:
    """An event in TensorBoard's file format. TensorBoard's own writer is not used: when the disk is full, its thread prints a
    traceback and leaves half a record, after which the file is unreadable."""
    file = io.BytesIO()
    RecordWriter(file).write(event.SerializeToString())
    return file.getvalue()
