"""Which mean over a mini-batch a loss is.

A micro-batch gives the sum of its tokens' losses, each by a weight, over a divisor of the whole mini-batch. Summed over
micro-batches and ranks that is the mean. Counts are those of the whole mini-batch: a mean taken per micro-batch or per rank
would weigh the tokens of a small one more.
"""

from __future__ import annotations

import torch
from torch import Tensor

from configs.schema import Aggregation


def aggregation_weights(aggregation: Aggregation, mask: Tensor, prompt_tokens: Tensor) -> Tensor:
    """Weights [B, 1] of the tokens' losses, to be summed over the mask [B, T] and divided by `aggregation_divisor`.

    Rows are whole sequences. prompt_tokens: [B] trained tokens of the mini-batch, over all ranks, that answer the row's prompt.
    """
    if aggregation == "sequence_mean":
        return mask.sum(1, keepdim=True).clamp(min=1).float().reciprocal()
    if aggregation == "prompt_mean":
        return prompt_tokens[:, None].clamp(min=1).float().reciprocal()
    return torch.ones(len(mask), 1, device=mask.device)


def aggregation_divisor(aggregation: Aggregation, tokens: int, sequences: int, prompts: int, max_tokens: int) -> int:
    """What the weighted sum over a mini-batch is divided by.

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
