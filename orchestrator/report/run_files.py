"""The data of a report: the files of a run's folder, read once."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs import RunConfig, load_config
from orchestrator.evaluation import last_samples
from orchestrator.run import stage_seconds
from orchestrator.storage import read_lines, read_metrics
from placement.types import Stage

Line = Mapping[str, Any]


@dataclass(frozen=True)
class Pair:
    """The two answers to one held-out prompt: lines of evaluation/before.jsonl and evaluation/after.jsonl."""

    before: Line
    after: Line


@dataclass(frozen=True)
class RunFiles:
    """The files of a run's folder that the report shows."""

    folder: Path
    config: RunConfig
    config_text: str
    metrics: Sequence[Line]
    summary: Mapping[str, Any]
    seconds: Mapping[Stage, float]
    """Stage -> seconds of all its sessions until now."""
    pairs: Sequence[Pair]
    """Of all held-out prompts, also those without scores."""
    samples: Sequence[Line]
    """Logged answers of the last PPO step that has some."""

    @classmethod
    def read(cls, folder: Path) -> RunFiles:
        """Raises ValueError if the evaluations have different prompts, or a line is not JSON; names file and line."""
        text = (folder / "config.yaml").read_text(encoding="utf-8")
        summary = folder / "summary.json"
        return cls(
            folder=folder,
            config=load_config(folder / "config.yaml", saved=True),
            config_text=text,
            metrics=read_metrics(folder),
            summary=json.loads(summary.read_text(encoding="utf-8")) if summary.exists() else {},
            seconds=stage_seconds(folder),
            pairs=_read_pairs(folder / "evaluation"),
            samples=last_samples(folder, "ppo"),
        )

    def lines(self, stage: str) -> list[Line]:
        """Metrics of the stage's steps, without the line of step 0."""
        return [line for line in self.metrics if line["stage"] == stage and line["step"] > 0]

    def curve(self, stage: str, metric: str) -> tuple[list[int], list[float]]:
        """Steps and values of a metric, including step 0, without steps that have no finite value."""
        lines = [line for line in self.metrics if line["stage"] == stage and line.get(metric) is not None]
        return [line["step"] for line in lines], [line[metric] for line in lines]

    def last(self, stage: str, metric: str) -> tuple[int, float] | None:
        """Step and value of the last finite value of a metric; None if it has none."""
        steps, values = self.curve(stage, metric)
        return (steps[-1], values[-1]) if values else None

    def total(self, stage: str, metric: str) -> float:
        """Sum of a metric over the stage's steps."""
        return sum(self.curve(stage, metric)[1])

    def steps(self, stage: str) -> int:
        """The stage's last finished step."""
        return max((line["step"] for line in self.lines(stage)), default=0)

    def finished(self, stage: str) -> bool:
        return (self.folder / "models" / stage).exists()

    def names(self) -> tuple[str, str]:
        """Names of the models before and after PPO."""
        return ("SFT" if self._had_sft() else "Before PPO", "PPO")

    def started_from(self) -> str:
        """Name of the model before PPO within a sentence."""
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
    for number, (old, new) in enumerate(zip(before, after, strict=True), start=1):
        if old["prompt"] != new["prompt"]:
            raise ValueError(f"{paths[1]}:{number}: not the prompt of {paths[0]}: {new['prompt'][:80]!r}")
    return [Pair(old, new) for old, new in zip(before, after, strict=True)]
