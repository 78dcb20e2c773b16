"""What a run records step by step: the record in its folder, and all other loggers that the settings name."""

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
"""Is told of a logger that failed: the setting that names it, and the error."""


class Recorder:
    """Gives the metrics of one stage of a run to its loggers; one process at a time writes to a run folder.

    Only the record (JsonlLogger) can end a run, by a DiskError. Of another logger the first error is told, and it still gets the
    next steps; one that cannot be made is left out.

    Args:
        folder: The run's folder; made where it does not exist.
        run: Name of the run.
        stage: sft, rm or ppo.
        resume_step: The stage goes on after this step: what was recorded of later ones is dropped, so that they are not there
            twice. None: the stage begins anew, and all that was recorded of it is dropped. Other stages' lines stay.
        settings: Of the loggers beside the record.
        on_error: Is told of loggers that fail.

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
        self._told: set[str] = set()
        self._record = JsonlLogger(logged)
        self._record.rewind(last_step)
        self._others: dict[str, Logger] = {}
        for i, chosen in enumerate(settings):
            name = f"loggers.{i} ({chosen.kind})"
            with self._sparing(name):
                self._others[name] = Logger.of(chosen, logged)
        self._tell(lambda logger: logger.rewind(last_step))

    def record(self, step: int, metrics: Mapping[str, float]) -> None:
        """Give a step's metrics to all loggers.

        Raises:
            ValueError: a metric is named stage, step or time.
            DiskError: the disk is full or fails. The record ends with the last step that was written whole.
        """
        for name in RESERVED:
            if name in metrics:
                raise ValueError(f"metric {name!r}: the name is taken by the line's own fields {', '.join(RESERVED)}")
        values = {name: float(value) for name, value in metrics.items()}
        try:
            self._record.log(step, values)
        finally:
            self._tell(lambda logger: logger.log(step, values))

    def keep_answers(self, step: int, answers: Sequence[Mapping[str, Any]], most_bytes: int) -> None:
        """Give some of a step's answers to all loggers; they are written with the step's next metrics."""
        self._record.keep_answers(step, answers, most_bytes)
        self._tell(lambda logger: logger.keep_answers(step, answers, most_bytes))

    def rewind(self, step: int) -> None:
        """Forget this stage's steps after `step`, which are about to be done again. Raises DiskError."""
        self._record.rewind(step)
        self._tell(lambda logger: logger.rewind(step))

    def failed(self, role: str, kind: str) -> None:
        """Tell of a call to a worker that failed."""
        self._tell(lambda logger: logger.failed(role, kind))

    def spent(self, seconds: Mapping[tuple[Role, str], float]) -> None:
        """Tell how long calls to workers took: (role, method) -> seconds."""
        self._tell(lambda logger: logger.spent(seconds))

    def workers(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Tell of new workers. rows: see Logger.workers."""
        self._tell(lambda logger: logger.workers(rows))

    def close(self) -> None:
        """Raises DiskError where something of the record is left that cannot be written."""
        try:
            self._record.close()
        finally:
            self._tell(lambda logger: logger.close())

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

    def _tell(self, tell: Callable[[Logger], None]) -> None:
        for name, logger in self._others.items():
            with self._sparing(name):
                tell(logger)

    @contextmanager
    def _sparing(self, name: str) -> Iterator[None]:
        """An error in the block is told, the first of each logger, and goes no further."""
        try:
            yield
        except Stopped:
            raise
        except Exception as error:
            if name not in self._told:
                self._told.add(name)
                self._on_error(name, error)
