"""DPO (Rafailov et al. 2023) as a plugin: a stage `dpo` that trains the actor on preferences, held near the reference."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from pydantic import PositiveFloat
from torch import Tensor
from torch.nn.functional import logsigmoid

from troupe import BatchSettings, StageSpec, Supervised, masked, remote, request
from workers.data import encode_preferences
from workers.data.batching import Rows
from workers.data.step_inputs import SupervisedBatch
from workers.models.heads import Batch
from workers.training.policy import PolicyWorker
from workers.training.schedule import StageStep

Reference = dict[int, np.ndarray]
"""Row of the dataset -> the reference's log-probabilities [2] of the chosen and of the rejected response."""


class DPOSettings(BatchSettings):
    """Direct preference optimization."""

    beta: PositiveFloat = 0.1
    """Scale of the implied reward, beta * log(actor / reference); a smaller one lets the actor go further."""


class DPOWorker(PolicyWorker):
    """A rank of the actor or of the reference."""

    @remote(phase="score")
    def pair_log_probs(self, part: SupervisedBatch) -> Reference:
        with self.evaluating():
            scored = [(rows, self._pairs(part, rows).cpu().numpy()) for rows in part.micro_batches]
        return {int(row): pair for rows, pairs in scored for row, pair in zip(rows, pairs, strict=True)}

    @remote(phase="train")
    def train_dpo(
        self, part: SupervisedBatch, reference: Reference, at: StageStep, seed: tuple[int, ...]
    ) -> dict[str, float]:
        right: list[Tensor] = []
        losses = [partial(self._dpo_loss, part, rows, reference, right) for rows in part.micro_batches]
        return self.optimize(losses, at, seed, dict) | self.sum_over_ranks({"accuracy": float(sum(right))})

    @remote(phase="score")
    def dpo_loss(self, part: SupervisedBatch, reference: Reference) -> dict[str, float]:
        right: list[Tensor] = []
        with self.evaluating():
            loss = sum(float(self._dpo_loss(part, rows, reference, right)) for rows in part.micro_batches)
        return self.sum_over_ranks({"loss": loss, "accuracy": float(sum(right))})

    def _pairs(self, part: SupervisedBatch, rows: Rows) -> Tensor:
        """Log-probabilities [rows, 2] of the chosen and of the rejected responses."""
        pairs = [self.datasets[part.data][i] for i in rows]
        batch = Batch([pair.chosen for pair in pairs] + [pair.rejected for pair in pairs], self.device)
        log_probs, _ = self.module(batch)
        return masked(log_probs, batch.mask).sum(dim=1).reshape(2, len(pairs)).T

    def _dpo_loss(self, part: SupervisedBatch, rows: Rows, reference: Reference, right: list[Tensor]) -> Tensor:
        """A micro-batch's share of the mean over the batch's pairs (eq. 7); its share of the accuracy goes to `right`."""
        at_reference = torch.tensor(np.array([reference[int(row)] for row in rows]), device=self.device).reshape(-1, 2)
        rewards = self.config.section("dpo").beta * (self._pairs(part, rows) - at_reference)
        margin = rewards[:, 0] - rewards[:, 1]
        right.append((margin > 0).sum() / part.count)
        return -logsigmoid(margin).sum() / part.count


class DPO(Supervised):
    """In a step the reference scores the pairs, then the actor learns from them."""

    spec = StageSpec(
        name="dpo",
        title="Direct preference optimization",
        short_title="DPO",
        roles=lambda config: ("actor", "reference"),
        trained=("actor",),
        concurrent=(("reference",), ("actor",)),
        phases=("load", "score", "train", "save"),
        workers=dict.fromkeys(("actor", "reference"), f"{__name__}:{DPOWorker.__name__}"),
        rows="pairs",
        sequences_per_row=2,
    )
    Config = DPOSettings
    kind = "preference"
    methods = (DPOWorker.train_dpo, DPOWorker.dpo_loss)

    def encode(self) -> Callable[..., Any]:
        return partial(encode_preferences, max_length=self.settings.max_length, overlong=self.settings.overlong)

    def extra(self, data: str, rows: Rows) -> tuple[Reference]:
        """The reference's log-probabilities of the rows."""
        parts = self.team.parts("reference", data, rows, self.settings.micro_batch_tokens // 2)
        call = self.team.groups["reference"].scatter([request(DPOWorker.pair_log_probs, part) for part in parts])
        return ({row: pair for each in call.get() for row, pair in each.items()},)
