"""Properties of every split of rows, for any lengths."""

from collections.abc import Sequence
from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.data.batching import Rows, aligned_micro_batches, balance, micro_batches, mini_batches, pad_right

quick = settings(deadline=None, max_examples=150, derandomize=True)
rows_of_tokens = st.lists(st.integers(1, 60), min_size=1, max_size=40)


def size(lengths: Sequence[int], rows: Rows | range) -> int:
    """Tokens of a micro-batch, padding included."""
    return len(rows) * max(lengths[row] for row in rows)


def assert_partition(parts: list[Rows], count: int) -> None:
    assert sorted(row for part in parts for row in part.tolist()) == list(range(count))


# ---------------------------------------------------------------- ranks


@quick
@given(st.lists(st.integers(1, 500), max_size=70), st.integers(1, 9))
def test_balance(lengths: list[int], parts: int) -> None:
    shards = balance(lengths, parts)
    assert_partition(shards, len(lengths))
    counts = [len(rows) for rows in shards]
    assert max(counts) - min(counts) <= 1
    assert len(shards) == parts
    assert counts[0] or not lengths
    tokens = [sum(lengths[row] for row in rows) for rows in shards]
    least = min(lengths, default=0) if len(lengths) % parts == 0 else 0
    assert max(tokens) - min(tokens) <= max(lengths, default=0) - least
    assert all((np.diff(rows) > 0).all() for rows in shards)
    assert all(np.array_equal(x, y) for x, y in zip(shards, balance(np.array(lengths), parts), strict=True))


def test_balance_of_many_rows_is_nearly_exact() -> None:
    lengths = np.random.default_rng(0).integers(1, 1000, 512)
    tokens = [lengths[rows].sum() for rows in balance(lengths, 8)]
    assert max(tokens) - min(tokens) < 20


@pytest.mark.parametrize("rows", range(6))
def test_balance_by_hand(rows: int) -> None:
    """Longest rows first, each to the rank with the fewest tokens; the last round goes to the ranks with the fewest."""
    expected = [
        [[], [], []],
        [[0], [], []],
        [[0], [1], []],
        [[0], [1], [2]],
        [[0], [1], [2, 3]],
        [[0], [1, 4], [2, 3]],
    ]
    assert [part.tolist() for part in balance([50, 40, 30, 20, 10][:rows], 3)] == expected[rows]


# ---------------------------------------------------------------- mini-batches


@quick
@given(st.permutations(range(20)), st.integers(0, 20), st.integers(1, 25))
def test_mini_batches_are_as_equal_as_can_be(order: list[int], rows: int, count: int) -> None:
    cut = mini_batches(np.array(order[:rows], np.intp), count)
    assert [row for part in cut for row in part] == order[:rows]
    assert len(cut) == min(count, rows)
    sizes = [len(part) for part in cut]
    assert max(sizes, default=1) - min(sizes, default=1) <= 1
    assert sizes == sorted(sizes, reverse=True)


def test_mini_batches_by_hand() -> None:
    assert [len(part) for part in mini_batches(np.arange(63), 8)] == [8, 8, 8, 8, 8, 8, 8, 7]
    assert [part.tolist() for part in mini_batches(np.array([4, 2]), 3)] == [[4], [2]]
    assert mini_batches(np.arange(0), 3) == []


# ---------------------------------------------------------------- micro-batches


def fewest_and_smallest(lengths: list[int], max_tokens: int) -> tuple[int, int]:
    """By trying all splits of the sorted rows: the fewest micro-batches, and the smallest possible size of the largest one."""
    ordered = sorted(lengths)
    for count in range(1, len(ordered) + 1):
        sizes = []
        for cuts in combinations(range(1, len(ordered)), count - 1):
            bounds = [0, *cuts, len(ordered)]
            parts = [range(a, b) for a, b in pairwise(bounds)]
            if all(len(part) == 1 or size(ordered, part) <= max_tokens for part in parts):
                sizes.append(max(size(ordered, part) for part in parts))
        if sizes:
            return count, min(sizes)
    raise AssertionError("one row per micro-batch is always possible")


@quick
@given(rows_of_tokens, st.integers(1, 300))
def test_micro_batches_keep_the_bound(lengths: list[int], max_tokens: int) -> None:
    batches = micro_batches(lengths, max_tokens)
    assert_partition(batches, len(lengths))
    assert all(len(rows) == 1 or size(lengths, rows) <= max_tokens for rows in batches)
    in_order = [lengths[row] for rows in batches for row in rows]
    assert in_order == sorted(lengths, reverse=True)


@quick
@given(st.lists(st.integers(1, 20), min_size=1, max_size=9), st.integers(1, 80))
def test_micro_batches_are_the_fewest_and_the_most_even(lengths: list[int], max_tokens: int) -> None:
    batches = micro_batches(lengths, max_tokens)
    assert (len(batches), max(size(lengths, rows) for rows in batches)) == fewest_and_smallest(lengths, max_tokens)


def test_micro_batches_by_hand() -> None:
    assert [rows.tolist() for rows in micro_batches([3, 90, 2, 3, 2, 1], 9)] == [[1], [0, 3], [2, 4, 5]]
    assert [len(rows) for rows in micro_batches([10] * 9, 40)] == [3, 3, 3]
    assert micro_batches([], 9) == []


@quick
@given(
    st.lists(st.lists(st.integers(1, 60), max_size=12), min_size=1, max_size=4),
    st.integers(1, 200),
)
def test_ranks_have_the_same_number_of_micro_batches(shards: list[list[int]], max_tokens: int) -> None:
    ranks = aligned_micro_batches(shards, max_tokens)
    for lengths, batches in zip(shards, ranks, strict=True):
        assert_partition(batches, len(lengths))
        filled = [rows for rows in batches if len(rows)]
        assert all(len(rows) == 1 or size(lengths, rows) <= max_tokens for rows in filled)
        assert len(filled) == min(len(batches), len(lengths)), "padding only if there are too few rows"
        assert all(len(rows) for rows in batches[: len(filled)]), "and at the end"
    needed = max(len(micro_batches(lengths, max_tokens)) for lengths in shards)
    assert {len(batches) for batches in ranks} == {needed}


def test_a_rank_that_needs_fewer_micro_batches_cuts_smaller_ones() -> None:
    ranks = aligned_micro_batches([[20] * 4 + [10] * 5, [10] * 9], 40)
    assert [[len(rows) for rows in batches] for batches in ranks] == [[2, 2, 4, 1], [3, 3, 2, 1]]


def test_a_rank_with_too_few_rows_computes_padding() -> None:
    ranks = aligned_micro_batches([[9, 9, 9], [1, 1], []], 10)
    assert [[rows.tolist() for rows in batches] for batches in ranks] == [[[0], [1], [2]], [[0], [1], []], [[], [], []]]


@quick
@given(rows_of_tokens, st.integers(1, 7), st.integers(1, 200))
def test_every_row_is_computed_once_by_one_rank(lengths: list[int], ranks: int, max_tokens: int) -> None:
    """The split that every batch uses."""
    shards = balance(lengths, ranks)
    cut = aligned_micro_batches([np.array(lengths)[rows] for rows in shards], max_tokens)
    computed = [row for rows, batches in zip(shards, cut, strict=True) for batch in batches for row in rows[batch]]
    assert sorted(computed) == list(range(len(lengths)))
    assert len({len(batches) for batches in cut}) == 1


# ---------------------------------------------------------------- padding


def test_pad_right() -> None:
    padded = pad_right([np.array([1, 2, 3], dtype=np.int32), np.array([4], dtype=np.int32)], -1, np.int32)
    assert padded.dtype == np.int32
    assert padded.tolist() == [[1, 2, 3], [4, -1, -1]]
    assert pad_right([np.ones(1, bool), np.ones(2, bool)], False, bool).tolist() == [[True, False], [True, True]]
    assert pad_right([], 0.0, np.float32).shape == (0, 1)
