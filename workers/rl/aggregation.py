"""The mean that a loss takes over a mini-batch.

A micro-batch contributes the weighted sum of its tokens' losses, divided by a count of the whole mini-batch. The sum over
micro-batches and ranks is the mean. All counts are of the whole mini-batch: a mean per micro-batch or per rank would give the
tokens of small ones a larger weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from configs.schema import Aggregation


def aggregation_weights(aggregation: Aggregation, mask: Tensor, prompt_tokens: Tensor) -> Tensor:
    """Weights [B, 1] of the tokens' losses, to be summed over the mask [B, T] and divided by `aggregation_divisor`.

    Rows are whole sequences. prompt_tokens: [B] trained tokens of the mini-batch, over all ranks, in answers to the row's prompt.
    """
    if aggregation == "sequence_mean":
        return mask.sum(1, keepdim=True).clamp(min=1).float().reciprocal()
    if aggregation == "prompt_mean":
        return prompt_tokens[:, None].clamp(min=1).float().reciprocal()
    return torch.ones(len(mask), 1, device=mask.device)


def aggregation_divisor(aggregation: Aggregation, tokens: int, sequences: int, prompts: int, max_tokens: int) -> int:
    """Divisor of the weighted sum over a mini-batch.

    tokens, sequences, prompts: trained tokens, sequences and draws of prompts of the mini-batch, over all ranks.
    max_tokens: of `constant` (Liu et al. 2025, Dr. GRPO): the longest answer allowed.

    token_mean: sum over tokens / tokens. sequence_mean: mean over sequences of token means. sequence_sum: mean over sequences of
    token sums. constant: sum over tokens / (sequences x max_tokens). prompt_mean: mean over prompts of token means.
    """
    match aggregation:
        case "token_mean":
            return tokens
        case "sequence_mean" | "sequence_sum":
            return sequences
        case "constant":
            return sequences * max_tokens
        case "prompt_mean":
            return prompts
