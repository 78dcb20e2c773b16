"""What the report is made of: the files of a run's folder, read once."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs import RunConfig, load_config
from orchestrator.evaluation.sample_log import last_samples
from orchestrator.run.sessions import stage_seconds
from orchestrator.storage.metrics_file import read_lines, read_metrics
from placement.types import Stage

Line = Mapping[str, Any]


@dataclass(frozen=True)
class Pair:
    """The two answers to one held-out prompt: lines of evaluation/before.jsonl and evaluation/after.jsonl."""

    before: Line
    after: Line


@dataclass(frozen=True)
class RunFiles:
    """A run's folder, as far as the report shows it."""

    folder: Path
    config: RunConfig
    config_text: str
    metrics: Sequence[Line]
    summary: Mapping[str, Any]
    seconds: Mapping[Stage, float]
    """Stage -> seconds of all its sessions, up to now."""
    pairs: Sequence[Pair]
    """Of all held-out prompts, whether their answers have scores or not."""
    samples: Sequence[Line]
    """Answers of the last PPO step of which some were kept."""

    @classmethod
    def read(cls, folder: Path) -> RunFiles:
        """Raises ValueError where the evaluations are of different prompts, or a line is not JSON; names file and line."""
        text = (folder / "config.yaml").read_text(encoding="utf-8")
        summary = folder / "summary.json"
        return cls(
            folder=folder,
            config=load_config(folder / "config.yaml"),
            config_text=text,
            metrics=read_metrics(folder),
            summary=json.loads(summary.read_text(encoding="utf-8")) if summary.exists() else {},
            seconds=stage_seconds(folder),
            pairs=_read_pairs(folder / "evaluation"),
            samples=last_samples(folder, "ppo"),
        )

    def lines(self, stage: str) -> list[Line]:
        """Metrics of the stage's steps, without what was recorded before its first."""
        return [line for line in self.metrics if line["stage"] == stage and line["step"] > 0]

    def curve(self, stage: str, metric: str) -> tuple[list[int], list[float]]:
        """Steps and values of a metric, step 0 included; steps without a finite value are left out."""
        lines = [line for line in self.metrics if line["stage"] == stage and line.get(metric) is not None]
        return [line["step"] for line in lines], [line[metric] for line in lines]

    def last(self, stage: str, metric: str) -> tuple[int, float] | None:
        """The last finite value of a metric and the step it is of; none where there is none."""
        steps, values = self.curve(stage, metric)
        return (steps[-1], values[-1]) if values else None

    def total(self, stage: str, metric: str) -> float:
        """Sum of a metric over the stage's steps."""
        return sum(self.curve(stage, metric)[1])

    def steps(self, stage: str) -> int:
        """Steps that the stage has done."""
        return max((line["step"] for line in self.lines(stage)), default=0)

    def finished(self, stage: str) -> bool:
        return (self.folder / "models" / stage).exists()

    def names(self) -> tuple[str, str]:
        """What the models before and after PPO are called."""
        return ("SFT" if self._had_sft() else "Before PPO", "PPO")

    def started_from(self) -> str:
        """The model before PPO, in a sentence."""
        return "the SFT model" if self._had_sft() else "the model before PPO"

    def _had_sft(self) -> bool:
        return bool(self.steps("sft")) or self.finished("sft")


def _read_pairs(folder: Path) -> list[Pair]:
    paths = folder / "before.jsonl", folder / "after.jsonl"
    if not all(path.exists() for path in paths):
        return []
    before, after = (read_lines(path) for path in paths)
    if len(before) != len(after):
        raise ValueError(f"{paths[1]}: {len(after)} prompts, but {paths[0]} has {len(before)}")
    for number, (one, other) in enumerate(zip(before, after, strict=True), start=1):
        if one["prompt"] != other["prompt"]:
            raise ValueError(f"{paths[1]}:{number}: another prompt than in {paths[0]}: {other['prompt'][:80]!r}")
    return [Pair(one, other) for one, other in zip(before, after, strict=True)]
