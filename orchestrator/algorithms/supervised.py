"""The two supervised stages: fine-tuning on demonstrations, and a reward model from preferences."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from configs.schema import BatchSettings, ModelSettings, RewardModelSettings, Role, SFTSettings
from orchestrator.algorithms.base import Algorithm
from orchestrator.preflight.model_checks import Head, ModelUse
from orchestrator.preflight.preflight import Input
from orchestrator.run.run_dir import Run, local
from orchestrator.storage.metrics_file import read_metrics
from orchestrator.worker_groups.calls import Call
from orchestrator.worker_groups.deadlines import BACKWARD, Cost
from orchestrator.worker_groups.team import pretrained
from placement import stages
from workers.api import PolicyApi, TrainerApi, ValueApi, request
from workers.data import Counts, DataError, RowKind, batches, encode_demonstrations, encode_preferences
from workers.data.batching import Rows
from workers.training.schedule import StageStep


class Supervised(Algorithm):
    """A loop over batches of dataset rows. Subclasses name the role, the kind of rows and the workers' methods."""

    kind: RowKind
    learns_from = "train"
    methods: tuple[Callable[..., dict[str, float]], Callable[..., dict[str, float]]]
    """Of the worker: an optimizer step on a rank's part (part, *extra, at, seed), and its metrics alone (part, *extra)."""
    settings: BatchSettings
    dropout = 0.0

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self.settings = self.config.section(self.name)

    @property
    def role(self) -> Role:
        """The trained role."""
        return self.spec.trained[0]

    @property
    def model_settings(self) -> ModelSettings:
        """A property, not a field: `auto` is resolved later, when the cluster is known."""
        return self.config.model

    def encode(self) -> Callable[..., Any]:
        """The function that tokenises the stage's rows."""
        raise NotImplementedError

    def inputs(self) -> list[Input]:
        named = {"train": self.settings.train, "validation": self.settings.validation}
        return [
            Input(name, f"{self.name}.{name}", data, self.kind, self.encode()) for name, data in named.items() if data
        ]

    def models(self) -> list[ModelUse]:
        head: Head = "language" if self.role == "actor" else "scalar"
        setting = f"{self.name}.max_length"
        return [self.start_use([head], longest=self.settings.max_length, longest_settings=setting)]

    @property
    def steps(self) -> int:
        rows = self.counts["train"].kept
        return max(1, math.ceil(self.settings.epochs * rows / self.settings.batch_size - 1e-9))

    def load(self) -> None:
        """Load the trained model, the same model frozen for the other roles, and the data for all of them."""
        path = self.run.starting_model(self.name)
        settings = pretrained(self.model_settings) if path == str(self.run.trained("sft")) else self.model_settings
        counts = {}
        for role in self.team.groups:
            optimizer = self.settings.optimizer if role == self.role else None
            call = self.team.groups[role].setup_call(TrainerApi.load, path, settings, optimizer, self.dropout)
            counts[role] = call.get()[0]
            for name, rows in self.data.items():
                if name in ("train", "validation"):
                    self.team.add_data(name, rows, role)
        self.parameters = counts[self.role]
        lengths, _ = self.team.lengths["train"]
        self.order = batches(lengths, self.settings.batch_size, self.settings.epochs, self.config.seed)

    def step(self, step: int) -> dict[str, float]:
        rows, every = self.order[step - 1], self.settings.validate_every
        with self.context.phase("train"):
            at, seed = StageStep(step, self.steps), (self.config.seed, step)
            metrics = self.call(self.methods[0], "train", rows, at, seed).get()
        tokens = float(self.team.lengths["train"][0][rows].sum())
        metrics |= {"samples": float(len(rows)), "tokens": tokens, "seconds/step": self.context.seconds["train"]}
        metrics["tokens_per_second"] = tokens / metrics["seconds/step"]
        if "validation" in self.data and (step == self.steps or (every and step % every == 0)):
            with self.context.phase("validate"):
                metrics |= self.validate()
        return self.shown(metrics) | self.context.spent()

    def validate(self) -> dict[str, float]:
        """Metrics of all validation rows."""
        metrics = self.call(self.methods[1], "validation", np.arange(len(self.data["validation"]))).get()
        return {f"validation/{name}": value for name, value in self.shown(metrics).items()}

    def extra(self, data: str, rows: Rows) -> tuple[Any, ...]:
        """Further arguments of both methods: numbers that another role has computed, for example."""
        return ()

    def call(
        self, method: Callable[..., dict[str, float]], data: str, rows: Rows, *args: Any
    ) -> Call[dict[str, float]]:
        """A call of one of the two methods on some rows, with each rank's part."""
        parts = self.team.parts(self.role, data, rows, self.settings.micro_batch_tokens // self.spec.sequences_per_row)
        extra = self.extra(data, rows)
        passes = BACKWARD if method == self.methods[0] else 1.0
        cost = Cost(passes * float(self.team.lengths[data][0][rows].sum()), len(parts[0].micro_batches))
        requests = [request(method, part, *extra, *args) for part in parts]
        return self.team.groups[self.role].scatter(requests, cost).reduce(lambda results: results[0])

    def shown(self, metrics: dict[str, float]) -> dict[str, float]:
        return metrics

    def result(self) -> dict[str, float]:
        return {"parameters": self.parameters, "steps": self.steps, **self._last_validation()}

    def _last_validation(self) -> dict[str, float]:
        """Read from metrics.jsonl, because a process that only exports has no validation of its own."""
        lines = [line for line in read_metrics(self.run.folder) if line["stage"] == self.name]
        by_step = [{k: v for k, v in line.items() if k.startswith("validation/") and v is not None} for line in lines]
        return next(filter(None, reversed(by_step)), {})


class SFT(Supervised):
    """Stage 1."""

    spec = stages.SFT
    kind = "demonstration"
    methods = (PolicyApi.train_demonstrations, PolicyApi.demonstration_loss)

    settings: SFTSettings

    def encode(self) -> Callable[..., Any]:
        most, overlong = self.settings.max_length, self.settings.overlong
        return partial(encode_demonstrations, max_length=most, overlong=overlong, turns=self.settings.turns)

    def shown(self, metrics: dict[str, float]) -> dict[str, float]:
        return metrics | {
            "perplexity": math.exp(min(metrics["loss"], 50.0)) if math.isfinite(metrics["loss"]) else math.nan
        }


class RewardModel(Supervised):
    """Stage 2."""

    spec = stages.REWARD_MODEL
    kind = "preference"
    methods = (ValueApi.train_pairs, ValueApi.pair_accuracy)
    settings: RewardModelSettings

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self.dropout = self.settings.dropout

    @property
    def model_settings(self) -> ModelSettings:
        return self.settings.model or super().model_settings

    def text_model(self) -> tuple[str, str, ModelSettings]:
        own = self.settings.model
        return ("rm.model", local(own.path), own) if own else super().text_model()

    def take(self, name: str, encoded: Any, counts: Counts) -> None:
        super().take(name, encoded, counts)
        if name == "train" and self.settings.margin and not any(pair.margin for pair in encoded):
            raise DataError(
                f"no row of {self.settings.train.name} has a margin (column `margin`, or the one that rm.train.columns names for "
                f"it), but rm.margin was {self.settings.margin:g}; 0 would fit"
            )

    def encode(self) -> Callable[..., Any]:
        return partial(encode_preferences, max_length=self.settings.max_length, overlong=self.settings.overlong)

    def inputs(self) -> list[Input]:
        sft = self.config.sft
        data = self.settings.normalize_on or (sft.train if sft else None)
        if data is None:
            return super().inputs()
        most = self.settings.max_length
        encode = partial(encode_demonstrations, max_length=most, overlong="cut", turns="last")
        return [*super().inputs(), Input("demonstrations", "rm.normalize_on", data, "demonstration", encode)]

    def complete(self) -> None:
        """Normalise the scores to mean 0 and standard deviation 1 on the demonstrations; the exported config has the numbers."""
        self.normalization: dict[str, float] = {}
        if "demonstrations" not in self.data:
            return
        self.team.add_data("demonstrations", self.data["demonstrations"], "reward")
        rows = np.arange(len(self.data["demonstrations"]))
        parts = self.team.parts("reward", "demonstrations", rows, self.settings.micro_batch_tokens)
        requests = [request(ValueApi.normalize, part.data, part.micro_batches) for part in parts]
        mean, std = self.team.groups["reward"].scatter(requests).get()[0]
        self.normalization = {"raw_score_mean": mean, "raw_score_std": std}

    def result(self) -> dict[str, float]:
        return super().result() | self.normalization
