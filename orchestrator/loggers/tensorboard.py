"""Metrics as events that TensorBoard shows."""

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
"""Step of what no rewind drops."""


class TensorBoardLogger(Logger):
    """Writes events to tensorboard/<stage>/ of the run's folder, into a file of its own.

    A method raises DiskError where the disk is full or fails; what could not be written is written with the next step's.
    """

    Config = TensorBoardSettings

    def __init__(self, config: TensorBoardSettings, stage: LoggedStage) -> None:
        super().__init__(config, stage)
        # TensorBoard wants to know where a run begins anew; it then drops what stands from that step on in the same
        # folder, whatever the tag: hence a folder for each stage.
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
    """An event as it stands in TensorBoard's files. Written by itself: their writer's thread prints a traceback when the
    disk is full, and leaves half a record, after which nothing can be read."""
    file = io.BytesIO()
    RecordWriter(file).write(event.SerializeToString())
    return file.getvalue()
