"""Gives each step's metrics to the loggers: the record in the run's folder, and the loggers of the settings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import orchestrator.loggers.ray_metrics
import orchestrator.loggers.tensorboard  # noqa: F401  both register their loggers
from configs.schema import LoggerSettings, Role
from orchestrator.loggers.base import LoggedStage, Logger
from orchestrator.loggers.jsonl import JsonlLogger
from orchestrator.run.stop_signal import Stopped
from orchestrator.storage.atomic_files import DiskError

RESERVED = ("stage", "step", "time")

OnError = Callable[[str, Exception], None]
"""Called when a logger fails: (setting that names it, error)."""


class Recorder:
    """Gives the metrics of one stage of a run to its loggers; one process at a time writes to a run folder.

    Only the record (JsonlLogger) can end a run, by a DiskError. The first error of another logger is reported, and the logger
    still gets the next steps; a logger that cannot be created is left out.

    Args:
        folder: The run's folder; created if needed.
        run: Name of the run.
        stage: sft, rm or ppo.
        resume_step: The stage goes on after this step; recorded later steps are dropped, because they will be repeated. None:
            the stage starts from the beginning, and all its recorded steps are dropped. Other stages' lines stay.
        settings: Of the loggers other than the record.
        on_error: Called for loggers that fail.

    Raises:
        DiskError: the disk is full or fails.
    """

    def __init__(
        self,
        folder: Path,
        run: str,
        stage: str,
        resume_step: int | None,
        settings: Sequence[LoggerSettings],
        on_error: OnError,
    ) -> None:
        logged = LoggedStage(folder, run, stage)
        last_step = -1 if resume_step is None else resume_step
        self._on_error = on_error
        self._failed: set[str] = set()
        self._record = JsonlLogger(logged)
        self._record.rewind(last_step)
        self._others: dict[str, Logger] = {}
        for i, chosen in enumerate(settings):
            name = f"loggers.{i} ({chosen.kind})"
            with self._sparing(name):
                self._others[name] = Logger.of(chosen, logged)
        self._for_others(lambda logger: logger.rewind(last_step))

    def record(self, step: int, metrics: Mapping[str, float]) -> None:
        """Give a step's metrics to all loggers.

        Raises:
            ValueError: a metric is named stage, step or time.
            DiskError: the disk is full or fails. The record ends with the last complete step.
        """
        for name in RESERVED:
            if name in metrics:
                raise ValueError(f"metric {name!r}: the name is taken by the line's own fields {', '.join(RESERVED)}")
        values = {name: float(value) for name, value in metrics.items()}
        try:
            self._record.log(step, values)
        finally:
            self._for_others(lambda logger: logger.log(step, values))

    def keep_answers(self, step: int, answers: Sequence[Mapping[str, Any]], most_bytes: int) -> None:
        """Give sampled responses of a step to all loggers; they are written with the step's next metrics."""
        self._record.keep_answers(step, answers, most_bytes)
        self._for_others(lambda logger: logger.keep_answers(step, answers, most_bytes))

    def rewind(self, step: int) -> None:
        """Drop this stage's steps after `step`: they will be repeated. Raises DiskError."""
        self._record.rewind(step)
        self._for_others(lambda logger: logger.rewind(step))

    def failed(self, role: str, kind: str) -> None:
        """Log a failed call to a worker."""
        self._for_others(lambda logger: logger.failed(role, kind))

    def spent(self, seconds: Mapping[tuple[Role, str], float]) -> None:
        """Log the seconds of calls to workers: (role, method) -> seconds."""
        self._for_others(lambda logger: logger.spent(seconds))

    def workers(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Log new workers. rows: see Logger.workers."""
        self._for_others(lambda logger: logger.workers(rows))

    def close(self) -> None:
        """Raises DiskError if a part of the record cannot be written."""
        try:
            self._record.close()
        finally:
            self._for_others(lambda logger: logger.close())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except DiskError:
            if error is None:  # otherwise the error that ended the block is more useful
                raise

    def _for_others(self, call: Callable[[Logger], None]) -> None:
        for name, logger in self._others.items():
            with self._sparing(name):
                call(logger)

    @contextmanager
    def _sparing(self, name: str) -> Iterator[None]:
        """Report the first error of each logger in the block; further errors are ignored."""
        try:
            yield
        except Stopped:
            raise
        except Exception as error:
            if name not in self._failed:
                self._failed.add(name)
                self._on_error(name, error)
