"""A logger of one's own with settings of its own, as a module that `plugins` names: each step's metrics as rows of a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from configs.extensions import settings_kind
from configs.schema import RunConfig, Settings
from orchestrator.loggers.base import LoggedStage, Logger, loggers


@settings_kind(RunConfig, "loggers")
class CSVSettings(Settings):
    """A table with the rows step, metric, value."""

    kind: Literal["csv"] = "csv"
    file: str = "metrics.csv"
    """Its name in the run's folder, after that of the stage."""


@loggers.register("csv")
class CSVLogger(Logger):
    def __init__(self, settings: CSVSettings, stage: LoggedStage) -> None:
        self.path = stage.folder / f"{stage.name}-{settings.file}"

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        with self.path.open("a") as table:
            table.writelines(f"{step},{name},{value!r}\n" for name, value in metrics.items())

    def rewind(self, step: int) -> None:
        rows = self.path.read_text().splitlines(keepends=True) if self.path.exists() else []
        self.path.write_text("".join(row for row in rows if int(row.partition(",")[0]) <= step))
