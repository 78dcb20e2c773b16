"""KL divergence of the policy from the reference."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

KLEstimator = Literal["k1", "k2", "k3"]


def kl_estimate(log_ratio: Tensor, kind: KLEstimator) -> Tensor:
    """Estimate of KL(p | q) in nats, element by element, from samples of p.

    log_ratio: log p - log q of the sampled token, any shape; for KL(actor | reference) log pi - log ref, [B, T].
    Schulman 2020, "Approximating KL divergence", http://joschu.net/blog/kl-approx.html.

    k1: log_ratio; unbiased, may be negative. k2: half its square; biased, low variance.
    k3: exp(-log_ratio) - 1 + log_ratio; unbiased and never negative.
    """
    if kind == "k1":
        return log_ratio
    if kind == "k2":
        return 0.5 * log_ratio.square()
    # expm1: near 0, exp(x) - 1 - x in float32 would be rounding error only.
    return torch.expm1(-log_ratio) + log_ratio
