"""Means over a mini-batch, put together from micro-batches of any cut, against the mean written out."""

from __future__ import annotations

from itertools import pairwise
from statistics import fmean
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.schema import Aggregation
from workers.rl.aggregation import aggregation_divisor, aggregation_weights

MAX_TOKENS = 50


def mean_by_hand(aggregation: str, rows: list[list[float]], groups: list[int]) -> float:
    """rows: losses of each sequence's trained tokens."""
    prompts = [[x for row, group in zip(rows, groups, strict=True) if group == k for x in row] for k in set(groups)]
    return {
        "token_mean": fmean(x for row in rows for x in row),
        "sequence_mean": fmean(fmean(row) for row in rows),
        "sequence_sum": fmean(sum(row) for row in rows),
        "constant": sum(x for row in rows for x in row) / (len(rows) * MAX_TOKENS),
        "prompt_mean": fmean(fmean(tokens) for tokens in prompts),
    }[aggregation]


@pytest.mark.parametrize("aggregation", get_args(Aggregation))
@settings(deadline=None, max_examples=40, derandomize=True)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=8),
    cuts=st.lists(st.integers(0, 8), max_size=3),
    seed=st.integers(0, 999),
)
def test_the_shares_of_micro_batches_sum_to_the_mean(
    aggregation: Aggregation, lengths: list[int], cuts: list[int], seed: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    rows = [torch.randn(n, generator=draw, dtype=torch.float64).tolist() for n in lengths]
    groups = torch.randint(3, (len(rows),), generator=draw).tolist()
    prompt_tokens = torch.tensor([sum(n for n, k in zip(lengths, groups, strict=True) if k == g) for g in groups])
    divisor = aggregation_divisor(aggregation, sum(lengths), len(rows), len(set(groups)), MAX_TOKENS)
    found = 0.0
    for first, end in pairwise([0, *sorted(min(cut, len(rows)) for cut in cuts), len(rows)]):
        part = rows[first:end]  # of a rank without rows: none
        mask = torch.zeros(len(part), max(map(len, part), default=1), dtype=torch.bool)
        losses = torch.full(mask.shape, torch.nan, dtype=torch.float64)
        for i, row in enumerate(part):
            mask[i, : len(row)] = True
            losses[i, : len(row)] = torch.tensor(row, dtype=torch.float64)
        weights = aggregation_weights(aggregation, mask, prompt_tokens[first:end])
        assert weights.shape == (len(part), 1)
        found += float((losses * weights)[mask].sum()) / divisor
    assert found == pytest.approx(mean_by_hand(aggregation, rows, groups), rel=1e-5, abs=1e-6)


def test_by_hand() -> None:
    """Two answers to one prompt and one to another, of 1, 2 and 3 tokens, each of which costs its answer's number."""
    mask = torch.tensor([[True, False, False], [True, True, False], [True, True, True]])
    losses = torch.tensor([[1.0], [2.0], [3.0]]) * mask
    wanted = {
        "token_mean": 14 / 6,
        "sequence_mean": 6 / 3,
        "sequence_sum": 14 / 3,
        "constant": 14 / 150,
        "prompt_mean": (5 / 3 + 3) / 2,
    }
    for aggregation in get_args(Aggregation):
        weights = aggregation_weights(aggregation, mask, torch.tensor([3, 3, 3]))
        share = float((losses * weights).sum()) / aggregation_divisor(aggregation, 6, 3, 2, MAX_TOKENS)
        assert share == pytest.approx(wanted[aggregation]), aggregation
