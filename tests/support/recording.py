"""A recorder with the default loggers of a run."""

from __future__ import annotations

from pathlib import Path

from configs import RunConfig
from orchestrator.loggers.recorder import Recorder
from orchestrator.storage.atomic_files import DiskError


def recording(folder: Path, run: str, stage: str, resume_step: int | None = None) -> Recorder:
    """A logger error fails the test, except for a full disk."""

    def failed(logger: str, error: Exception) -> None:
        if not isinstance(error, DiskError):
            raise error

    config = RunConfig.model_validate({"name": run, "model": {"path": "unused"}})
    return Recorder(folder, run, stage, resume_step, config.loggers, failed)
