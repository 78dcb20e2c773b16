"""Makes the batch that the actor and the critic are trained on from scored rollouts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from configs.schema import PPOSettings
from workers.data.batching import Rows, pad_right
from workers.data.samples import Sample
from workers.data.step_inputs import KLTerm, TrainStepInput
from workers.rl.advantages import (
    AllReduceSum,
    TokenAdvantage,
    masked,
    mean_and_variance,
    moments,
    token_rewards,
    whiten,
)
from workers.rl.kl import kl_estimate
from workers.training.skipped_steps import Arrays, micro_batch_numbers, token_rows


@dataclass(frozen=True)
class TrainingBatch:
    """A rank's samples and their training targets; tensors are [B, T] over trained tokens, padded on the right."""

    samples: list[Sample]
    mask: Tensor
    log_probs: Tensor
    """The engine's log-probabilities at sampling time."""
    reference: Tensor | None
    """The reference's log-probabilities."""
    values: Tensor | None
    advantages: Tensor
    returns: Tensor | None
    """Targets of the values; None if advantages are given per answer."""
    prompt_tokens: Tensor
    """[B] trained tokens of the sample's prompt group in its mini-batch, over all ranks."""
    kl: KLTerm
    metrics: dict[str, float]

    def arrays(self, micro_batches: list[Rows]) -> Arrays:
        """The samples of these micro-batches as arrays; per-token data is flat, [trained tokens], row after row."""
        rows = np.concatenate(micro_batches)
        columns = {
            "log_probs": self.log_probs,
            "reference": self.reference,
            "values": self.values,
            "advantages": self.advantages,
            "returns": self.returns,
        }
        flat = {name: x[rows][self.mask[rows]].cpu().numpy() for name, x in columns.items() if x is not None}
        return token_rows([self.samples[i] for i in rows]) | {"micro_batch": micro_batch_numbers(micro_batches)} | flat


def prepare(step_input: TrainStepInput, ppo: PPOSettings, total: AllReduceSum, device: torch.device) -> TrainingBatch:
    """Per-token rewards, advantages and returns of a rank's samples; whitening uses all ranks through `total`.

    A rank may have no sample: its tensors are then [0, 1], and it only takes part in the sums over ranks.
    """
    samples = step_input.rollouts.fetch()

    def padded(rows: list[np.ndarray]) -> Tensor:
        return torch.from_numpy(pad_right(rows, 0.0, np.float32)).to(device)

    log_probs = padded([s.log_probs for s in samples])
    reference = padded(step_input.reference.fetch()) if step_input.reference is not None else None
    values = padded(step_input.values.fetch()) if step_input.values is not None else None
    mask = padded([np.ones(len(s.log_probs), np.float32) for s in samples]).bool()
    advantages: Tensor
    returns: Tensor | None = None
    if step_input.advantages is not None:
        advantages = masked(torch.from_numpy(step_input.advantages).to(device)[:, None], mask)
    else:
        kl = (
            torch.zeros_like(log_probs)
            if reference is None
            else kl_estimate(log_probs - reference, step_input.kl.estimator)
        )
        rewards = token_rewards(
            torch.from_numpy(step_input.scores).to(device), kl, mask, step_input.kl.reward_coefficient
        )
        groups = torch.from_numpy(step_input.groups).to(device)
        estimate = TokenAdvantage.of(ppo.advantage)
        advantages, returns = estimate(rewards, values, mask, ppo.gamma, ppo.gae_lambda, groups, total)
    mean, variance = mean_and_variance(total(moments(advantages, mask)))
    metrics = {"advantage/mean": float(mean), "advantage/std": float(variance.sqrt())}
    if ppo.whiten_advantages:
        advantages = whiten(advantages, mask, mean.float(), variance.float())
    prompt_tokens = torch.from_numpy(step_input.prompt_tokens).to(device)
    return TrainingBatch(
        samples, mask, log_probs, reference, values, advantages, returns, prompt_tokens, step_input.kl, metrics
    )
