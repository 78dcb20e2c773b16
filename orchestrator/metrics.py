"""What a run measures: metrics.jsonl, TensorBoard events, and gauges on Ray's metrics port."""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from configs.schema import ROLES

FILE = "metrics.jsonl"
RESERVED = ("stage", "step", "time")

# Below these a last part such as "reward" is what was measured, or the name of a reward; it is not the role.
_NOT_BY_ROLE = ("evaluation", "reward")


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, in the order written; a non-finite value is None. Errors: see read_lines."""
    path = folder / FILE
    return read_lines(path) if path.exists() else []


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file.

    A last line without its newline is still being written, or was cut off by a crash: it is left out.

    Raises:
        ValueError: another line is not a JSON object; names file and line.
    """
    whole, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
    return [_parsed(path, number, line) for number, line in enumerate(whole.split("\n"), start=1) if line]


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

    Args:
        folder: The run's folder; made where it does not exist.
        run: Name of the run, a tag of the gauges.
        stage: sft, rm or ppo.
        resume_step: The stage goes on after this step: its lines of later steps are dropped, so that they are not there
            twice. None: the stage begins anew, and all of its earlier lines are dropped. Other stages' lines stay.
    """

    def __init__(self, folder: Path, run: str, stage: str, resume_step: int | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._stage = stage
        last_step = -1 if resume_step is None else resume_step
        _cut(folder, stage, last_step)
        self._lines = (folder / FILE).open("a", encoding="utf-8")
        # At a START event TensorBoard drops what earlier processes wrote into this folder from its step on, whatever
        # the tag: hence a folder for each stage.
        self._events = EventFileWriter(str(folder / "tensorboard" / stage))
        self._events.add_event(
            Event(wall_time=time.time(), step=last_step + 1, session_log=SessionLog(status=SessionLog.START))
        )
        self._gauges = _Gauges(run, stage)

    def record(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write one line, `{"stage", "step", "time", **metrics}`, and the same to TensorBoard and to Ray.

        JSON has no NaN or infinity: they become null in metrics.jsonl. TensorBoard shows them as they are; Ray leaves a
        gauge out of its port while it has no finite value.

        Raises:
            ValueError: a metric is named stage, step or time.
        """
        for name in RESERVED:
            if name in metrics:
                raise ValueError(f"metric {name!r}: the name is taken by the line's own fields {', '.join(RESERVED)}")
        now = time.time()
        values = {name: float(value) for name, value in metrics.items()}
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        line = {"stage": self._stage, "step": step, "time": round(now, 3), **finite}
        self._lines.write(json.dumps(line, allow_nan=False) + "\n")
        self._lines.flush()

        scalars = [Summary.Value(tag=f"{self._stage}/{name}", simple_value=value) for name, value in values.items()]
        self._events.add_event(Event(wall_time=now, step=step, summary=Summary(value=scalars)))
        self._events.flush()
        self._gauges.set(values)

    def close(self) -> None:
        self._lines.close()
        self._events.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


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


def _parsed(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        parsed = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{number}: not JSON ({error.msg}): {line[:80]!r}") from error
    if not isinstance(parsed, dict):
        raise ValueError(f"{path}:{number}: expected a JSON object, found {line[:80]!r}")
    return parsed


def _cut(folder: Path, stage: str, last_step: int) -> None:
    """Drop the stage's lines after `last_step` and a torn last line; the file is whole at every moment."""
    path = folder / FILE
    if not path.exists():
        return

    def kept() -> Iterator[str]:
        for line in read_metrics(folder):
            if line["stage"] != stage or line["step"] <= last_step:
                yield json.dumps(line) + "\n"

    partial = path.with_suffix(".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.writelines(kept())
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
