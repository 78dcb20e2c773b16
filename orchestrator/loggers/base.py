"""The interface of loggers, which write the metrics of a stage. The setting `loggers` selects them.

A custom logger is a class with its settings class, in a module that `plugins` names:

    class CSVLogger(Logger):
        class Config(Settings):
            kind: Literal["csv"] = "csv"

        def log(self, step: int, metrics: Mapping[str, float]) -> None: ...
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.extensions import Component
from configs.schema import Role, RunConfig


@dataclass(frozen=True)
class LoggedStage:
    """The stage whose metrics are logged."""

    folder: Path
    """The run's folder."""
    run: str
    """Name of the run."""
    name: str
    """sft, rm or ppo."""


class Logger(Component, owner=RunConfig, setting="loggers"):
    """Writes the metrics of one stage. The driver calls all methods between the calls to workers: they should return at once.
    An exception becomes a warning, and the run goes on (orchestrator.loggers.recorder).

    `log` is needed; the other methods do nothing unless they are overridden.
    """

    def __init__(self, config: Any, stage: LoggedStage) -> None:
        super().__init__(config)
        self.stage = stage

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log the metrics of a step. Step 0: measured before the first step. Values may be nan or infinite."""
        raise NotImplementedError

    def rewind(self, step: int) -> None:
        """Drop the stage's logged steps after `step`: they will be repeated. Also called when a run starts or resumes, before
        the first step; -1: the stage starts from the beginning."""

    def keep_answers(self, step: int, answers: Sequence[Mapping[str, Any]], most_bytes: int) -> None:
        """Log sampled responses of a step (orchestrator.evaluation.sample_log); its metrics follow. most_bytes: maximum size of
        a file of them."""

    def failed(self, role: str, kind: str) -> None:
        """Log a failed call to a worker of a role. kind: error, died, hung or lost."""

    def spent(self, seconds: Mapping[tuple[Role, str], float]) -> None:
        """Log the seconds of the latest step's calls to workers: (role, method) -> seconds."""

    def workers(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Log new workers. rows: one for every worker of the stage, with `role`, `restarts` so far and others."""

    def close(self) -> None:
        """Called at the end of the stage, also after an error."""
