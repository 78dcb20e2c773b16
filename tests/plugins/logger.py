"""A custom logger with its own settings: each step's metrics as rows of a table."""

from collections.abc import Mapping
from typing import Literal

from troupe import LoggedStage, Logger, Settings


class CSVLogger(Logger):
    class Config(Settings):
        """A table with the rows step, metric, value."""

        kind: Literal["csv"] = "csv"
        file: str = "metrics.csv"
        """Its name in the run's folder, after the name of the stage."""

    def __init__(self, config: Config, stage: LoggedStage) -> None:
        super().__init__(config, stage)
        self.path = stage.folder / f"{stage.name}-{config.file}"

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        with self.path.open("a") as table:
            table.writelines(f"{step},{name},{value!r}\n" for name, value in metrics.items())

    def rewind(self, step: int) -> None:
        """Drop the rows of later steps, which are about to be repeated."""
        rows = self.path.read_text().splitlines(keepends=True) if self.path.exists() else []
        self.path.write_text("".join(row for row in rows if int(row.partition(",")[0]) <= step))
