"""Which rows go to which rank, and which go together through a model: by tokens, not by rows.

Only lengths are looked at, so the driver plans with them and no token leaves the object store.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.intp]
"""Indices of rows."""


def balance(lengths: npt.ArrayLike, parts: int) -> list[Rows]:
    """Split rows into parts of the same count and nearly the same number of tokens.

    lengths: [N] tokens of each row. The parts' sums differ by at most the longest length less the shortest.
    Returns the rows of each part in ascending order. Raises ValueError where N does not divide by `parts`.
    """
    lengths = np.asarray(lengths)
    if len(lengths) % parts:
        raise ValueError(f"{len(lengths)} rows do not divide into {parts} parts of the same count")
    # Rows of like length are dealt out in rounds, the longest of a round to the part with the fewest tokens.
    # The old and the new difference of two parts then have opposite signs: none outgrows those within a round.
    rounds = np.argsort(-lengths, kind="stable").reshape(-1, parts)
    dealt = np.empty_like(rounds)
    tokens = np.zeros(parts, dtype=np.int64)
    for rows, hands in zip(rounds, dealt, strict=True):
        by_tokens = np.argsort(tokens, kind="stable")
        hands[by_tokens] = rows
        tokens[by_tokens] += lengths[rows]
    return [np.sort(rows) for rows in dealt.T]


def micro_batches(lengths: npt.ArrayLike, max_tokens: int) -> list[Rows]:
    """Split rows into the fewest micro-batches of rows x longest <= max_tokens, evenly filled, longest rows first.

    lengths: [N] tokens of each row, at least 1. Rows of like length go together; one longer than max_tokens goes alone.
    The longest go first so that a lack of memory shows at once.
    """
    return aligned_micro_batches([lengths], max_tokens)[0]


def aligned_micro_batches(shards: Sequence[npt.ArrayLike], max_tokens: int) -> list[list[Rows]]:
    """`micro_batches` of every rank's rows, the same number on all ranks and none empty: ranks compute in lockstep.

    shards: lengths of the rows of each rank. Raises ValueError where a rank has fewer rows than another needs
    micro-batches, which cannot be when all have the same number of rows.
    """
    orders = [np.argsort(-np.asarray(lengths), kind="stable") for lengths in shards]
    descending = [np.asarray(lengths)[order] for lengths, order in zip(shards, orders, strict=True)]
    count = max(len(_greedy(lengths, max_tokens)) for lengths in descending)
    for rank, lengths in enumerate(descending):
        if len(lengths) < count:
            raise ValueError(f"rank {rank} has {len(lengths)} rows, but another needs {count} micro-batches")
    starts = [_even_starts(lengths, count, max_tokens) for lengths in descending]
    return [
        [order[first:end] for first, end in pairwise([*rows, len(order)])]
        for order, rows in zip(orders, starts, strict=True)
    ]


def _greedy(descending: npt.NDArray[Any], limit: int, count: int = 0) -> list[int]:
    """First rows of the micro-batches when each takes as many rows as fit; at least `count` of them."""
    starts: list[int] = []
    row = 0
    while row < len(descending):
        starts.append(row)
        spare = len(descending) - row - max(count - len(starts), 0)
        row += max(1, min(limit // int(descending[row]), spare))
    return starts


def _even_starts(descending: npt.NDArray[Any], count: int, max_tokens: int) -> list[int]:
    """First rows of exactly `count` micro-batches, under the smallest limit that `count` can keep."""
    limits = range(1, max_tokens)
    limit = 1 + bisect_left(limits, True, key=lambda limit: len(_greedy(descending, limit)) <= count)
    return _greedy(descending, limit, count)


def spans(count: int, size: int) -> list[slice]:
    """`count` rows in order, `size` at a time."""
    return [slice(first, first + size) for first in range(0, count, size)]


def pad_right(rows: Sequence[npt.NDArray[Any]], value: Any) -> npt.NDArray[Any]:
    """Rows [T_i] of one dtype as one array [B, max T_i], filled up with `value` on the right."""
    padded = np.full((len(rows), max(map(len, rows))), value, dtype=rows[0].dtype)
    for target, row in zip(padded, rows, strict=True):
        target[: len(row)] = row
    return padded
