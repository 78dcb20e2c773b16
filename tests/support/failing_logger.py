"""A plugin whose logger always raises."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from configs.extensions import settings_kind
from configs.schema import RunConfig, Settings
from orchestrator.loggers.base import LoggedStage, Logger, loggers


@settings_kind(RunConfig, "loggers")
class FailingSettings(Settings):
    """Raises."""

    kind: Literal["failing"] = "failing"
    from_start: bool = False
    """The logger cannot even be made."""


@loggers.register("failing")
class FailingLogger(Logger):
    def __init__(self, settings: FailingSettings, stage: LoggedStage) -> None:
        if settings.from_start:
            raise OSError("no service there")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        raise OSError(f"the service is gone in step {step}")

    def close(self) -> None:
        raise OSError("the service is gone at the end")
