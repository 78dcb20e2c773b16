"""Group sequence policy optimization (Zheng et al. 2025): the ratio of a whole sequence, applied to each of its tokens."""

from typing import Literal

import torch
from pydantic import PositiveFloat

from troupe import LossInputs, LossOutput, PolicyLoss, Settings, masked


class GSPO(PolicyLoss):
    class Config(Settings):
        kind: Literal["gspo"] = "gspo"
        clip_low: PositiveFloat = 3e-4
        clip_high: PositiveFloat = 4e-4

    aggregation = "sequence_mean"

    def __call__(self, inputs: LossInputs) -> LossOutput:
        mask, log_ratio = inputs.loss_mask, inputs.log_ratio
        mean = log_ratio.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
        ratio = (mean.detach() + log_ratio - log_ratio.detach()).clamp(max=10).exp()
        advantages = masked(inputs.advantages, mask)
        plain = -advantages * ratio
        clipped = -advantages * ratio.clamp(1 - self.config.clip_low, 1 + self.config.clip_high)
        return LossOutput(torch.maximum(plain, clipped), {"clip_fraction": (clipped > plain).float()})
