"""The result of a run: its models, numbers and report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from orchestrator.run.run_dir import Run
from placement.types import Stage


@dataclass(frozen=True)
class Result:
    """Models, numbers, times and report of a run."""

    folder: Path
    """The run's folder."""
    models: dict[Stage, Path]
    """The finished stages' models, plain Hugging Face folders."""
    numbers: dict[Stage, dict[str, float]]
    """The stages' final numbers."""
    seconds: dict[Stage, float]
    """Stage -> seconds of all its sessions."""
    report: Path

    @classmethod
    def of(cls, run: Run) -> Result:
        """The result in a run's folder."""
        summary = run.read("summary.json")
        return cls(
            run.folder,
            {stage: run.model(stage) for stage in run.stages if run.finished(stage)},
            summary.get("stages", {}),
            summary.get("seconds", {}),
            run.folder.absolute() / "report.html",
        )
