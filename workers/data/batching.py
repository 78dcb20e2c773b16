"""Which rows go to which rank, and which go together through a model: by tokens, not by rows.

Only lengths are looked at, so the driver plans with them and no token leaves the object store. Any number of rows may be
shared out over any number of ranks. Every row is in exactly one micro-batch of one rank. Ranks compute in lockstep, so all
get the same number of micro-batches: a rank with fewer rows gets empty ones, for which it computes a row that counts nowhere
(workers.models.heads.Batch).
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
NO_ROWS: Rows = np.empty(0, np.intp)


def mini_batches(rows: Rows, count: int) -> list[Rows]:
    """Cut rows in their order into `count` mini-batches whose sizes differ by at most one.

    Where there are fewer rows than that, there are fewer mini-batches: none is empty.
    """
    return np.array_split(rows, min(count, len(rows))) if len(rows) else []


def balance(lengths: npt.ArrayLike, parts: int) -> list[Rows]:
    """Split rows into parts whose counts differ by at most one and that have nearly the same number of tokens.

    lengths: [N] tokens of each row. The parts' sums differ by at most the longest length and, where N divides by `parts`, by
    at most the longest less the shortest. Returns the rows of each part in ascending order; with fewer rows than parts some
    parts are empty, never the first.
    """
    count = len(lengths := np.asarray(lengths))
    # Rows without tokens fill the last round; they are not among the rows that are returned.
    lengths = np.pad(lengths, (0, -count % parts))
    # Rows of like length are dealt out in rounds, the longest of a round to the part with the fewest tokens.
    # The old and the new difference of two parts then have opposite signs: none outgrows those within a round.
    rounds = np.argsort(-lengths, kind="stable").reshape(-1, parts)
    dealt = np.empty_like(rounds)
    tokens = np.zeros(parts, dtype=np.int64)
    for rows, hands in zip(rounds, dealt, strict=True):
        by_tokens = np.argsort(tokens, kind="stable")
        hands[by_tokens] = rows
        tokens[by_tokens] += lengths[rows]
    return [np.sort(rows[rows < count]) for rows in dealt.T]


def micro_batches(lengths: npt.ArrayLike, max_tokens: int) -> list[Rows]:
    """Split rows into the fewest micro-batches of rows x longest <= max_tokens, evenly filled, longest rows first.

    lengths: [N] tokens of each row, at least 1. Rows of like length go together; one longer than max_tokens goes alone.
    The longest go first so that a lack of memory shows at once.
    """
    return aligned_micro_batches([lengths], max_tokens)[0]


def aligned_micro_batches(shards: Sequence[npt.ArrayLike], max_tokens: int) -> list[list[Rows]]:
    """`micro_batches` of every rank's rows, the same number on all ranks, since they compute in lockstep.

    shards: lengths of the rows of each rank. A rank that needs fewer micro-batches than another makes smaller ones; one with
    too few rows even for that ends with empty ones.
    """
    orders = [np.argsort(-np.asarray(lengths), kind="stable") for lengths in shards]
    descending = [np.asarray(lengths)[order] for lengths, order in zip(shards, orders, strict=True)]
    count = max(len(_greedy(lengths, max_tokens)) for lengths in descending)
    starts = [_even_starts(lengths, count, max_tokens) for lengths in descending]
    return [
        [order[first:end] for first, end in pairwise([*rows, len(order)])] + [NO_ROWS] * (count - len(rows))
        for order, rows in zip(orders, starts, strict=True)
    ]


def _greedy(descending: npt.NDArray[Any], limit: int, count: int = 0) -> list[int]:
    """First rows of the micro-batches when each takes as many rows as fit; at least `count` of them, if there are the rows."""
    starts: list[int] = []
    row = 0
    while row < len(descending):
        starts.append(row)
        spare = len(descending) - row - max(count - len(starts), 0)
        row += max(1, min(limit // int(descending[row]), spare))
    return starts


def _even_starts(descending: npt.NDArray[Any], count: int, max_tokens: int) -> list[int]:
    """First rows of `count` micro-batches (or one for each row, if those are fewer), under the smallest limit that they keep."""
    limits = range(1, max_tokens)
    limit = 1 + bisect_left(limits, True, key=lambda limit: len(_greedy(descending, limit)) <= count)
    return _greedy(descending, limit, count)


def spans(count: int, size: int) -> list[slice]:
    """`count` rows in order, `size` at a time."""
    return [slice(first, first + size) for first in range(0, count, size)]


def pad_right(rows: Sequence[npt.NDArray[Any]], value: Any, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """Rows [T_i] as one array [B, max T_i], filled up with `value` on the right; [0, 1] where there is no row."""
    padded = np.full((len(rows), max(map(len, rows), default=1)), value, dtype)
    for target, row in zip(padded, rows, strict=True):
        target[: len(row)] = row
    return padded
