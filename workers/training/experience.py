"""From scored rollouts to what the actor and the critic learn from."""

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
from workers.training.skipped_steps import Arrays, numbered, token_rows


@dataclass(frozen=True)
class TrainingBatch:
    """A rank's samples with what they are to teach; tensors are [B, T] over trained tokens, padded on the right."""

    samples: list[Sample]
    mask: Tensor
    log_probs: Tensor
    """Of the engine, when it sampled."""
    reference: Tensor | None
    """The reference's log-probabilities."""
    values: Tensor | None
    advantages: Tensor
    returns: Tensor | None
    """What values are to become; None: there are advantages per answer."""
    prompt_tokens: Tensor
    """[B] trained tokens of the sample's group in its mini-batch, over all ranks."""
    kl: KLTerm
    metrics: dict[str, float]

    def arrays(self, micro_batches: list[Rows]) -> Arrays:
        """Some of the samples as arrays; what there is per trained token stands end to end, [trained tokens]."""
        rows = np.concatenate(micro_batches)
        columns = {
            "log_probs": self.log_probs,
            "reference": self.reference,
            "values": self.values,
            "advantages": self.advantages,
            "returns": self.returns,
        }
        flat = {name: x[rows][self.mask[rows]].cpu().numpy() for name, x in columns.items() if x is not None}
        return token_rows([self.samples[i] for i in rows]) | {"micro_batch": numbered(micro_batches)} | flat


def prepare(work: TrainStepInput, ppo: PPOSettings, total: AllReduceSum, device: torch.device) -> TrainingBatch:
    """Per-token rewards, advantages and returns of a rank's samples; whitening reaches over all ranks through `total`.

    A rank may have no sample: then tensors are [0, 1], and it takes part in the sums over ranks alone.
    """
    samples = work.rollouts.fetch()

    def padded(rows: list[np.ndarray]) -> Tensor:
        return torch.from_numpy(pad_right(rows, 0.0, np.float32)).to(device)

    log_probs = padded([s.log_probs for s in samples])
    reference = padded(work.reference.fetch()) if work.reference is not None else None
    values = padded(work.values.fetch()) if work.values is not None else None
    mask = padded([np.ones(len(s.log_probs), np.float32) for s in samples]).bool()
    advantages: Tensor
    returns: Tensor | None = None
    if work.advantages is not None:
        advantages = masked(torch.from_numpy(work.advantages).to(device)[:, None], mask)
    else:
        kl = torch.zeros_like(log_probs) if reference is None else kl_estimate(log_probs - reference, work.kl.estimator)
        rewards = token_rewards(torch.from_numpy(work.scores).to(device), kl, mask, work.kl.reward_coefficient)
        groups = torch.from_numpy(work.groups).to(device)
        estimate = TokenAdvantage.of(ppo.advantage)
        advantages, returns = estimate(rewards, values, mask, ppo.gamma, ppo.gae_lambda, groups, total)
    mean, variance = mean_and_variance(total(moments(advantages, mask)))
    metrics = {"advantage/mean": float(mean), "advantage/std": float(variance.sqrt())}
    if ppo.whiten_advantages:
        advantages = whiten(advantages, mask, mean.float(), variance.float())
    prompt_tokens = torch.from_numpy(work.prompt_tokens).to(device)
    return TrainingBatch(
        samples, mask, log_probs, reference, values, advantages, returns, prompt_tokens, work.kl, metrics
    )
