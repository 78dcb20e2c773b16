"""What a run measures: metrics.jsonl, TensorBoard events, and gauges on Ray's metrics port."""

from __future__ import annotations

import io
import json
import math
import os
import re
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from configs.schema import ROLES
from orchestrator.integrity import DiskError, sync, writing

FILE = "metrics.jsonl"
RESERVED = ("stage", "step", "time")
VOLATILE = ("time", "tokens_per_second", "seconds/", "memory_gib/")

# Below these a last part such as "reward" is what was measured, or the name of a reward; it is not the role.
_NOT_BY_ROLE = ("evaluation", "reward", "timeouts", "errors")


class MetricsError(ValueError):
    """A file of lines that cannot be read: says which line, and why."""


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, in the order written; a non-finite value is None. Errors: see read_lines."""
    path = folder / FILE
    return read_lines(path) if path.exists() else []


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file.

    A last line without its newline is still being written, or was cut off by a crash: it is left out.

    Raises:
        MetricsError: another line is not a JSON object; names file and line.
    """
    whole, _, _ = path.read_bytes().rpartition(b"\n")
    return [_parsed(path, number, line) for number, line in enumerate(whole.split(b"\n"), start=1) if line]


def repeatable(folder: Path, stage: str) -> list[dict[str, Any]]:
    """A stage's lines without what no two runs have in common: the clock, and memory."""
    return [
        {name: value for name, value in line.items() if not name.startswith(VOLATILE)}
        for line in read_metrics(folder)
        if line["stage"] == stage
    ]


def gauge_name(metric: str) -> tuple[str, str]:
    """(Prometheus name, role) of a metric; the role is "" where the metric belongs to none.

    >>> gauge_name("reward/mean"), gauge_name("memory_gib/actor"), gauge_name("role/critic/queue")
    (('troupe_reward_mean', ''), ('troupe_memory_gib', 'actor'), ('troupe_queue', 'critic'))
    """
    parts = metric.split("/")
    role = ""
    if parts[0] == "role" and len(parts) > 2 and parts[1] in ROLES:
        role, parts = parts[1], parts[2:]
    elif len(parts) > 1 and parts[-1] in ROLES and parts[0] not in _NOT_BY_ROLE:
        role, parts = parts[-1], parts[:-1]
    return "troupe_" + re.sub(r"[^a-zA-Z0-9_]", "_", "_".join(parts)), role


class Recorder:
    """Writes the metrics of one stage of a run; one process at a time writes to a run folder.

    What a full disk keeps from being written is written with the next step's, once there is space.

    Args:
        folder: The run's folder; made where it does not exist.
        run: Name of the run, a tag of the gauges.
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
        with writing(folder):
            board.mkdir(parents=True, exist_ok=True)
            _cut(folder, stage, last_step)
            self._lines = _Appended(self._path)
            self._events = _Appended(board / name)
        self._events.add(0, _record(Event(wall_time=time.time(), file_version="brain.Event:2")))
        self._begin_after(last_step)
        self._gauges = _Gauges(run, stage)

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
        self._gauges.set(values)
        self._flush()

    def rewind(self, step: int) -> None:
        """Forget this stage's steps after `step`, which are about to be done again. Raises DiskError."""
        self._lines.forget_after(step)
        self._events.forget_after(step)
        with writing(self._path):
            _cut(self._path.parent, self._stage, step)
            self._lines.reopen()
        self._begin_after(step)

    def close(self) -> None:
        """Raises DiskError where something is left that cannot be written."""
        try:
            self._flush()
        finally:
            self._lines.close()
            self._events.close()

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

    def _flush(self) -> None:
        with writing(self._path):
            self._lines.flush()
        with writing(self._events.path):
            self._events.flush()


class _Appended:
    """A file that grows by whole records: what cannot be written waits, and the file ends with its last whole record."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._waiting: list[tuple[int, bytes]] = []
        self._file = path.open("ab", buffering=0)

    def add(self, step: int, record: bytes) -> None:
        self._waiting.append((step, record))

    def forget_after(self, step: int) -> None:
        """Drop what waits of later steps."""
        self._waiting = [(at, record) for at, record in self._waiting if at <= step]

    def flush(self) -> None:
        while self._waiting:
            end = os.fstat(self._file.fileno()).st_size
            rest = memoryview(self._waiting[0][1])
            try:
                while rest:
                    rest = rest[self._file.write(rest) :]
            except OSError:
                self._file.truncate(end)
                raise
            del self._waiting[0]

    def reopen(self) -> None:
        """Go on in the file that now has the name."""
        self._file.close()
        self._file = self.path.open("ab", buffering=0)

    def close(self) -> None:
        self._file.close()


def _record(event: Event) -> bytes:
    """An event as it stands in TensorBoard's files. Written by itself: their writer's thread prints a traceback when the
    disk is full, and leaves half a record, after which nothing can be read."""
    file = io.BytesIO()
    RecordWriter(file).write(event.SerializeToString())
    return file.getvalue()


class _Gauges:
    """The latest values as gauges of this process on Ray's metrics port; nothing where Ray is not initialised."""

    def __init__(self, run: str, stage: str) -> None:
        self._tags = {"run": run, "stage": stage}
        self._gauges: dict[str, Any] = {}

    def set(self, values: Mapping[str, float]) -> None:
        import ray  # Half a second, which readers of metrics.jsonl need not spend.
        from ray.util.metrics import Gauge

        if not ray.is_initialized():
            return
        for metric, value in values.items():
            name, role = gauge_name(metric)
            if name not in self._gauges:
                self._gauges[name] = Gauge(name, description=f"Troupe: {metric}", tag_keys=("run", "stage", "role"))
            self._gauges[name].set(value, tags={**self._tags, "role": role})


def _parsed(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        parsed = json.loads(line)
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, or a number or nesting beyond all measure
        raise MetricsError(f"{path}:{number}: not JSON ({error}): {line[:80]!r}") from error
    if not isinstance(parsed, dict):
        raise MetricsError(f"{path}:{number}: expected a JSON object, found {line[:80]!r}")
    return parsed


def _cut(folder: Path, stage: str, last_step: int) -> None:
    """Drop the stage's lines after `last_step` and a torn last line; the file is whole at every moment."""
    path = folder / FILE
    if not path.exists():
        return
    kept = [line for line in read_metrics(folder) if line["stage"] != stage or line["step"] <= last_step]
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        sync(partial)
        partial.replace(path)
        sync(folder)
    finally:
        partial.unlink(missing_ok=True)
