"""Assigns rows to ranks and to micro-batches, balanced by tokens, not by rows.

Only lengths are needed, so the driver plans with them and no token leaves the object store. Any number of rows can be distributed
over any number of ranks. Every row is in exactly one micro-batch of one rank. Ranks compute in lockstep, so all get the same
number of micro-batches: a rank with fewer rows gets empty ones, for which it computes a padding row without effect
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
    """Split rows, in order, into `count` mini-batches whose sizes differ by at most one.

    With fewer rows than `count` there are fewer mini-batches: none is empty.
    """
    return np.array_split(rows, min(count, len(rows))) if len(rows) else []


def balance(lengths: npt.ArrayLike, parts: int) -> list[Rows]:
    """Split rows into parts with nearly equal tokens; their row counts differ by at most one.

    lengths: [N] tokens of each row. The parts' sums differ by at most the longest length and, if `parts` divides N, by at most
    the longest minus the shortest. Returns the rows of each part in ascending order; with fewer rows than parts, some
    parts are empty, never the first.
    """
    count = len(lengths := np.asarray(lengths))
    # Rows without tokens fill the last round; they are not returned.
    lengths = np.pad(lengths, (0, -count % parts))
    # Each round assigns one row of similar length to every part, the longest to the part with the fewest tokens.
    # Two parts' differences before and within a round then have opposite signs: the total never exceeds that of one round.
    rounds = np.argsort(-lengths, kind="stable").reshape(-1, parts)
    assigned = np.empty_like(rounds)
    tokens = np.zeros(parts, dtype=np.int64)
    for rows, row_of_part in zip(rounds, assigned, strict=True):
        by_tokens = np.argsort(tokens, kind="stable")
        row_of_part[by_tokens] = rows
        tokens[by_tokens] += lengths[rows]
    return [np.sort(rows[rows < count]) for rows in assigned.T]


def micro_batches(lengths: npt.ArrayLike, max_tokens: int) -> list[Rows]:
    """Split rows into the fewest micro-batches with rows x longest <= max_tokens, evenly filled, longest rows first.

    lengths: [N] tokens of each row, at least 1. Rows of similar length share a micro-batch; a row longer than max_tokens has its
    own. The longest come first, so that a lack of memory shows at once.
    """
    return aligned_micro_batches([lengths], max_tokens)[0]


def aligned_micro_batches(shards: Sequence[npt.ArrayLike], max_tokens: int) -> list[list[Rows]]:
    """`micro_batches` of every rank's rows, the same number on all ranks, since they compute in lockstep.

    shards: lengths of the rows of each rank. A rank that needs fewer micro-batches than another gets smaller ones, and empty
    ones at the end if it has too few rows.
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
    """First rows of the micro-batches if each takes as many rows as fit; at least `count` of them if there are enough rows."""
    starts: list[int] = []
    row = 0
    while row < len(descending):
        starts.append(row)
        spare = len(descending) - row - max(count - len(starts), 0)
        row += max(1, min(limit // int(descending[row]), spare))
    return starts


def _even_starts(descending: npt.NDArray[Any], count: int, max_tokens: int) -> list[int]:
    """First rows of `count` micro-batches (or of one per row, if fewer), under the smallest token limit that allows them."""
    limits = range(1, max_tokens)
    limit = 1 + bisect_left(limits, True, key=lambda limit: len(_greedy(descending, limit)) <= count)
    return _greedy(descending, limit, count)


def spans(count: int, size: int) -> list[slice]:
    """Slices of `size` over `count` rows, in order."""
    return [slice(first, first + size) for first in range(0, count, size)]


def pad_right(rows: Sequence[npt.NDArray[Any]], value: Any, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """Rows [T_i] as one array [B, max T_i], padded with `value` on the right; [0, 1] without rows."""
    padded = np.full((len(rows), max(map(len, rows), default=1)), value, dtype)
    for target, row in zip(padded, rows, strict=True):
        target[: len(row)] = row
    return padded
