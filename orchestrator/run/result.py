"""What a run gave: its models, its numbers, its report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from orchestrator.run.run_dir import Run
from placement.types import Stage


@dataclass(frozen=True)
class Result:
    """What a run gave."""

    folder: Path
    """The run's folder."""
    models: dict[Stage, Path]
    """The finished stages' models, plain Hugging Face folders."""
    numbers: dict[Stage, dict[str, float]]
    """The stages' final numbers."""
    seconds: dict[Stage, float]
    """How long each stage took, all its sessions together."""
    report: Path

    @classmethod
    def of(cls, run: Run) -> Result:
        """What lies in a run's folder."""
        summary = run.read("summary.json")
        return cls(
            run.folder,
            {stage: run.model(stage) for stage in run.stages if run.finished(stage)},
            summary.get("stages", {}),
            summary.get("seconds", {}),
            run.folder.absolute() / "report.html",
        )
