"""The two supervised stages: fine-tuning on demonstrations, and a reward model from preferences."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from configs.schema import BatchSettings, DatasetSettings, ModelSettings, OptimizerSettings, Role
from orchestrator.calls import Call
from orchestrator.deadlines import BACKWARD, Workload
from orchestrator.metrics import read_metrics
from orchestrator.stage import StageRun
from orchestrator.team import pretrained
from workers.batching import Rows
from workers.data import Row, RowKind, batches


class Supervised(StageRun):
    """A loop over batches of dataset rows. Subclasses name the role, the kind of rows and the workers' methods."""

    role: Role
    kind: RowKind
    train_method: str
    validate_method: str
    settings: BatchSettings
    model_settings: ModelSettings
    dropout = 0.0

    def trained(self) -> list[Role]:
        return [self.role]

    def read(self) -> None:
        self.data: dict[str, list[Row]] = {"train": self.rows(self.settings.train, self.kind)}
        if self.settings.validation:
            self.data["validation"] = self.rows(self.settings.validation, self.kind)

    @property
    def steps(self) -> int:
        return max(1, math.ceil(self.settings.epochs * len(self.data["train"]) / self.settings.batch_size - 1e-9))

    def load(self) -> None:
        optimizer: OptimizerSettings = self.settings.optimizer
        path = self.run.starting_model(self.name)
        settings = pretrained(self.model_settings) if path == str(self.run.model("sft")) else self.model_settings
        group = self.team.groups[self.role]
        self.parameters = group.prepare("load", path, settings, optimizer, self.dropout).get()[0]
        for name, rows in self.data.items():
            self.add(name, rows, self.kind)
        lengths, _ = self.team.lengths["train"]
        self.order = batches(lengths, self.settings.batch_size, self.settings.epochs, self.config.seed)

    def add(self, name: str, rows: list[Row], kind: RowKind) -> None:
        self.team.add_data(name, rows, [self.role])
        self.team.tokenize(self.role, name, kind, self.settings.max_length)

    def step(self, step: int) -> dict[str, float]:
        rows, every = self.order[step - 1], self.settings.validate_every
        with self.phase("train"):
            progress, seed = (step - 1) / self.steps, (self.config.seed, step)
            metrics = self.call(self.train_method, "train", rows, progress, seed).get()
        tokens = float(self.team.lengths["train"][0][rows].sum())
        metrics["tokens_per_second"] = tokens / self.seconds["train"]
        if "validation" in self.data and (step == self.steps or (every and step % every == 0)):
            with self.phase("validate"):
                metrics |= self.validate()
        return self.shown(metrics) | self.spent()

    def validate(self) -> dict[str, float]:
        """Metrics of all validation rows (of as many as divide among the ranks)."""
        count = len(self.data["validation"])
        rows = np.arange(count - count % len(self.team.groups[self.role]))
        found = self.call(self.validate_method, "validation", rows).get()
        return {f"validation/{name}": value for name, value in self.shown(found).items()}

    def call(self, method: str, data: str, rows: Rows, *args: Any) -> Call[dict[str, float]]:
        parts = self.team.parts(self.role, data, rows, self.settings.micro_batch_tokens)
        passes = BACKWARD if method == self.train_method else 1.0
        work = Workload(passes * float(self.team.lengths[data][0][rows].sum()), len(parts[0].micro_batches))
        return self.team.groups[self.role].scatter(
            method, [(part, *args) for part in parts], work=work, then=lambda results: results[0]
        )

    def shown(self, metrics: dict[str, float]) -> dict[str, float]:
        return metrics

    def result(self) -> dict[str, float]:
        return {"parameters": self.parameters, "steps": self.steps, **self._last_validation()}

    def _last_validation(self) -> dict[str, float]:
        """From the metrics, where it is too for a process that only exports what another has trained."""
        lines = [line for line in read_metrics(self.run.folder) if line["stage"] == self.name]
        found = [{k: v for k, v in line.items() if k.startswith("validation/") and v is not None} for line in lines]
        return next(filter(None, reversed(found)), {})


class SFT(Supervised):
    """Stage 1."""

    name = "sft"
    role = "actor"
    kind = "demonstration"
    train_method, validate_method = "train_demonstrations", "demonstration_loss"

    def read(self) -> None:
        assert self.config.sft is not None
        self.settings, self.model_settings = self.config.sft, self.config.model
        super().read()

    def shown(self, metrics: dict[str, float]) -> dict[str, float]:
        return metrics | {
            "perplexity": math.exp(min(metrics["loss"], 50.0)) if math.isfinite(metrics["loss"]) else math.nan
        }


class RewardModel(Supervised):
    """Stage 2."""

    name = "rm"
    role = "reward"
    kind = "preference"
    train_method, validate_method = "train_pairs", "pair_accuracy"

    def read(self) -> None:
        settings = self.config.rm
        assert settings is not None
        self.settings, self.model_settings = settings, settings.model or self.config.model
        self.dropout = settings.dropout
        super().read()
        normalize_on: DatasetSettings | None = settings.normalize_on or (
            self.config.sft.train if self.config.sft else None
        )
        self.demonstrations = self.rows(normalize_on, "demonstration") if normalize_on else []

    def complete(self) -> None:
        """Give the scores mean 0 and deviation 1 on the demonstrations: the exported config says how."""
        self.normalization: dict[str, float] = {}
        if not self.demonstrations:
            return
        self.add("demonstrations", self.demonstrations, "demonstration")
        count = len(self.demonstrations)
        rows = np.arange(count - count % len(self.team.groups["reward"]))
        parts = self.team.parts("reward", "demonstrations", rows, self.settings.micro_batch_tokens)
        args = [(part.data, part.micro_batches) for part in parts]
        call: Call[list[tuple[float, float]]] = self.team.groups["reward"].scatter("normalize", args)
        mean, std = call.get()[0]
        self.normalization = {"raw_score_mean": mean, "raw_score_std": std}

    def result(self) -> dict[str, float]:
        return super().result() | self.normalization
