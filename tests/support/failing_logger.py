"""A plugin whose logger always raises."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from configs.schema import Settings
from orchestrator.loggers.base import LoggedStage, Logger


class FailingLogger(Logger):
    class Config(Settings):
        """Raises."""

        kind: Literal["failing"] = "failing"
        from_start: bool = False
        """The logger cannot even be created."""

    def __init__(self, config: Config, stage: LoggedStage) -> None:
        super().__init__(config, stage)
        if config.from_start:
            raise OSError("no service there")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        raise OSError(f"the service is gone in step {step}")

    def close(self) -> None:
        raise OSError("the service is gone at the end")
