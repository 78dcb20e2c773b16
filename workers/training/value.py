"""The critic and the reward model: a transformer with a scalar head, trained on returns and on preferences."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from workers.api import ValueApi
from workers.data.batching import Rows
from workers.data.samples import RaggedArray, SampleRefs
from workers.data.step_inputs import SupervisedBatch, TrainStepInput
from workers.models.heads import Batch, ScalarModel
from workers.models.loading import load_hf
from workers.rl.advantages import moments
from workers.rl.losses import explained_variance, masked_sum, pairwise, value_losses
from workers.training import experience
from workers.training.schedule import StageStep
from workers.training.skipped_steps import Arrays, micro_batch_numbers, token_rows
from workers.training.trainer import Trainer
from workers.weight_sync.probe import sequences


@torch.no_grad()
def score(module: nn.Module, samples: Sequence[Any], micro_batches: list[Rows], device: torch.device) -> np.ndarray:
    """Scores [samples] float32 at the sequences' last tokens."""
    module.eval()
    scores = np.empty(len(samples), np.float32)
    for indices in micro_batches:
        scores[indices] = module(Batch([samples[i] for i in indices], device), per_token=False).cpu().numpy()
    return scores


class ValueWorker(Trainer, ValueApi):
    """One rank of a scalar model."""

    scalar = True

    def probe_outputs(self, ids: np.ndarray) -> np.ndarray:
        """Scores [rows] at the last tokens."""
        return score(self.module, sequences(ids), [np.arange(len(ids))], self.device)

    def read_back(self, folder: str, ids: np.ndarray) -> np.ndarray:
        settings = self.settings.model_copy(update={"init": "pretrained", "quantize": None, "lora": None})
        model = ScalarModel(load_hf(settings, folder, scalar=True, seed=0))
        return score(model, sequences(ids), [np.arange(len(ids))], torch.device("cpu"))

    # ------------------------------------------------------------ critic

    def values(self, rollouts: SampleRefs, micro_batches: list[Rows]) -> tuple[RaggedArray, np.ndarray]:
        """The value before each answer token, and the first value of each answer."""
        samples = rollouts.fetch()
        rows: list[np.ndarray] = [np.empty(0, np.float32)] * len(samples)
        with self.evaluating():
            for indices in micro_batches:
                batch = Batch([samples[i] for i in indices], self.device)
                values = self.module(batch, per_token=True)
                for i, row, mask in zip(indices, values.cpu(), batch.mask.cpu(), strict=True):
                    rows[i] = row[mask].numpy()
        return RaggedArray.of(rows, np.float32), np.array([row[0] for row in rows])

    def train_values(self, step_input: TrainStepInput, at: StageStep, seed: tuple[int, ...]) -> dict[str, float]:
        """The critic's updates of one step: epochs x mini-batches. Skipped updates only count in `skipped/critic`."""
        ppo = self.config.ppo
        assert ppo is not None
        answers = experience.prepare(step_input, ppo, self.total, self.device)
        assert answers.values is not None and answers.returns is not None
        variance = explained_variance(
            self.total(moments(answers.returns, answers.mask)),
            self.total(moments(answers.returns - answers.values, answers.mask)),
        )
        metrics = {"explained_variance": float(variance)}
        total, updates, skipped_updates = 0.0, 0, 0
        for epoch in range(ppo.epochs):
            for k, mini in enumerate(step_input.mini_batches):
                losses = [partial(self._value_loss, answers, i, mini.tokens) for i in mini.micro_batches]
                debug_batch = partial(answers.arrays, mini.micro_batches)
                steps = self.optimize(losses, at, (*seed, epoch, k), debug_batch)
                metrics |= {"lr/critic": steps["lr"], "grad_norm/critic": steps["grad_norm"]}
                if steps["skipped"]:
                    skipped_updates += 1
                else:
                    total, updates = total + steps["loss"], updates + 1
        mean = {"loss/value": total / updates} if updates else {}
        return metrics | mean | {"skipped/critic": float(skipped_updates)}

    def _value_loss(self, answers: experience.TrainingBatch, indices: Rows, tokens: int) -> Tensor:
        ppo = self.config.ppo
        assert ppo is not None and answers.values is not None and answers.returns is not None
        batch = Batch([answers.samples[i] for i in indices], self.device)
        values = self.module(batch, per_token=True)
        old, returns = (x[indices, : values.shape[1]] for x in (answers.values, answers.returns))
        parts = value_losses.get(ppo.value_loss)(values, old, returns, batch.mask, ppo.value_clip_range)
        return masked_sum(parts.loss, batch.mask) / tokens

    # ------------------------------------------------------------ preferences

    def train_pairs(self, part: SupervisedBatch, at: StageStep, seed: tuple[int, ...]) -> dict[str, float]:
        """One optimizer step on the mean pairwise loss."""
        correct: list[Tensor] = []
        losses = [partial(self._pair_loss, part, i, correct, seed) for i in part.micro_batches]
        metrics = self.optimize(losses, at, seed, partial(self._debug_batch, part))
        return metrics | self.sum_over_ranks({"accuracy": float(sum(correct))})

    def pair_accuracy(self, part: SupervisedBatch) -> dict[str, float]:
        """Mean loss, and share of pairs whose chosen answer has the higher score, without training."""
        correct: list[Tensor] = []
        with self.evaluating():
            loss = sum(float(self._pair_loss(part, i, correct)) for i in part.micro_batches)
        return self.sum_over_ranks({"loss": loss, "accuracy": float(sum(correct))})

    def _pair_loss(
        self, part: SupervisedBatch, indices: Rows, correct: list[Tensor], seed: tuple[int, ...] = ()
    ) -> Tensor:
        """A micro-batch's share of the mean loss over the batch's pairs; appends its share of the accuracy to `correct`.

        seed: of the step. Dropout is seeded by it and the pair's row, so it does not depend on the rank.
        """
        settings = self.config.rm
        assert settings is not None
        pairs = [self.datasets[part.data][i] for i in indices]
        seeds = [hash((*seed, int(i), side)) % 2**63 for side in (0, 1) for i in indices]
        batch = Batch([p.chosen for p in pairs] + [p.rejected for p in pairs], self.device, seeds)
        chosen, rejected = self.module(batch, per_token=False).chunk(2)
        margin = settings.margin * torch.tensor([p.margin for p in pairs], device=self.device)
        correct.append((chosen > rejected).sum() / part.count)
        return pairwise(chosen, rejected, margin, settings.center).sum() / part.count

    def _debug_batch(self, part: SupervisedBatch) -> Arrays:
        pairs = [self.datasets[part.data][i] for indices in part.micro_batches for i in indices]
        sides = token_rows([p.chosen for p in pairs], "chosen_") | token_rows([p.rejected for p in pairs], "rejected_")
        return sides | {
            "margins": np.array([p.margin for p in pairs]),
            "micro_batch": micro_batch_numbers(part.micro_batches),
        }

    def normalize(self, data: str, micro_batches: list[Rows]) -> tuple[float, float]:
        """Normalize the scores to mean 0 and deviation 1 on these sequences. Returns the raw mean and deviation."""
        rows = self.datasets[data]
        mine = np.concatenate(micro_batches)
        scores = score(self.module, rows, micro_batches, self.device)[mine].astype(float)
        moments = {"n": float(len(mine)), "sum": float(scores.sum()), "squares": float((scores**2).sum())}
        sums = self.sum_over_ranks(moments)
        mean = sums["sum"] / sums["n"]
        std = max(sums["squares"] / sums["n"] - mean**2, 1e-12) ** 0.5
        assert isinstance(self.model, ScalarModel)
        old_mean, old_std = self.model.normalization
        config = self.model.hf.config
        config.score_mean, config.score_std = old_mean + old_std * mean, old_std * std
        return mean, std
