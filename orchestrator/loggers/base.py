"""What a logger is: a place that the metrics of a stage go to, chosen by the setting `loggers`.

A custom logger is a class with its settings, in a module that `plugins` names:

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
    """Where the metrics of one stage go. All methods are called by the driver, between the calls to workers: they should return
    at once. What they raise becomes a warning, and the run goes on (orchestrator.loggers.recorder).

    `log` is needed; the other methods do nothing unless they are overridden.
    """

    def __init__(self, config: Any, stage: LoggedStage) -> None:
        super().__init__(config)
        self.stage = stage

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take the metrics of a step. Step 0 is what was measured before the first step; values may be nan or infinite."""
        raise NotImplementedError

    def rewind(self, step: int) -> None:
        """Drop what was logged of the stage's steps after `step`: they are about to be done, or done again. Called before the
        first step too, also by the process that resumes a run; -1: the stage begins anew."""

    def keep_answers(self, step: int, answers: Sequence[Mapping[str, Any]], most_bytes: int) -> None:
        """Take answers that were generated in a step (orchestrator.evaluation.sample_log); its metrics follow. most_bytes: the
        largest size of a file of them."""

    def failed(self, role: str, kind: str) -> None:
        """Take note of a failed call to a worker of a role. kind: error, died, hung or lost."""

    def spent(self, seconds: Mapping[tuple[Role, str], float]) -> None:
        """Take the seconds of the latest step's calls to workers: (role, method) -> seconds."""

    def workers(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Take note of new workers. rows: `role` and `restarts` so far, among others, of every worker of the stage."""

    def close(self) -> None:
        """The stage has ended, well or not."""
