"""The data sent between workers: ragged arrays and references to their rows, compared with plain lists."""

from __future__ import annotations

from typing import Any

import numpy as np
import ray
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from placement import Cluster
from workers.data import Sequences
from workers.data.samples import RaggedArray, RolloutBatch, Sample, SampleRefs
from workers.data.step_inputs import RolloutInfo

ROWS = st.lists(st.lists(st.integers(-(2**31), 2**31 - 1), max_size=6), max_size=8)
on_ray = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@given(ROWS)
def test_ragged_rows_come_back(rows: list[list[int]]) -> None:
    ragged = RaggedArray.of([np.array(row, np.int64) for row in rows], np.int32)
    assert len(ragged) == len(rows)
    assert ragged.values.dtype == np.int32
    assert [ragged.row(i).tolist() for i in range(len(ragged))] == rows


def test_a_row_is_a_view() -> None:
    ragged = RaggedArray.of([np.arange(3), np.arange(2)], np.float32)
    assert np.shares_memory(ragged.row(1), ragged.values)


def test_a_batch_of_rollouts_gives_its_samples_back() -> None:
    turns = Sample(
        np.array([5, 6, 7, 8], np.int32),
        np.array([False, True, False, True]),
        np.array([-0.5, -0.25], np.float32),
        np.array([3, 4], np.int32),
    )
    batch = RolloutBatch.of([turns, Sample.of([8], [9], [-1.5], 4)])
    assert len(batch) == 2
    for sample, expected in zip((batch.row(0), batch.row(1)), (turns, Sample.of([8], [9], [-1.5], 4)), strict=True):
        for name in ("ids", "loss_mask", "log_probs", "versions"):
            actual = getattr(sample, name)
            assert actual.tolist() == getattr(expected, name).tolist()
            assert actual.dtype == getattr(expected, name).dtype
    assert (batch.row(0).prompt_length, batch.row(1).prompt_length) == (1, 1)
    assert Sample.of([1, 2], []).prompt_length == 2

    info = RolloutInfo.of([turns, batch.row(1)], [True, False])
    assert {name: value.tolist() for name, value in vars(info).items()} == {
        "prompt_lengths": [1, 1],
        "answer_lengths": [3, 1],
        "trained_tokens": [2, 1],
        "ended": [True, False],
        "min_versions": [3, 4],
        "max_versions": [4, 4],
    }
    assert all(len(value) == 0 for value in vars(RolloutInfo.of([], [])).values())


@given(st.lists(st.lists(st.booleans(), max_size=5), max_size=5))
def test_learnt_tokens_exclude_the_first_token(masks: list[list[bool]]) -> None:
    rows = [Sample(np.zeros(len(mask), np.int32), np.array(mask, bool)) for mask in masks]
    assert Sequences.of(rows).learnt.tolist() == [sum(mask[1:]) for mask in masks]


@st.composite
def scattered(draw: st.DrawFn) -> tuple[list[list[int]], list[list[int]]]:
    """Rows, and the indices of the rows of each object (an object may have none)."""
    rows = draw(st.lists(st.lists(st.integers(0, 99), max_size=4), min_size=1, max_size=10))
    parts = draw(st.integers(1, 4))
    shares: list[list[int]] = [[] for _ in range(parts)]
    for i in draw(st.permutations(range(len(rows)))):
        shares[draw(st.integers(0, parts - 1))].append(i)
    return rows, shares


def store(rows: list[list[int]], shares: list[list[int]]) -> SampleRefs:
    refs = [ray.put(RaggedArray.of([np.array(rows[i]) for i in share], np.int32)) for share in shares]
    return SampleRefs.of(refs, [np.array(share, np.intp) for share in shares], len(rows))


def fetched(refs: SampleRefs) -> list[list[int]]:
    return [row.tolist() for row in refs.fetch()]


@on_ray
@given(scattered(), st.data())
def test_stored_rows_are_fetched_in_order_and_taken(
    ray_here: Cluster, case: tuple[list[list[int]], list[list[int]]], data: st.DataObject
) -> None:
    rows, shares = case
    refs = store(rows, shares)
    assert len(refs) == len(rows)
    assert fetched(refs) == rows

    def indices(count: int) -> list[int]:
        return data.draw(st.lists(st.integers(0, count - 1), max_size=12))

    chosen = indices(len(rows))  # some more than once, some never
    taken = refs.take(np.array(chosen, np.intp))
    assert fetched(taken) == [rows[i] for i in chosen]
    owners = {next(k for k, share in enumerate(shares) if i in share) for i in chosen}
    assert set(taken.refs) == {refs.refs[k] for k in owners}, "only the needed objects are referenced"
    again = indices(len(chosen)) if chosen else []
    assert fetched(taken.take(np.array(again, np.intp))) == [rows[chosen[i]] for i in again]


def test_workers_read_rows_without_a_copy(ray_here: Cluster) -> None:
    """Ray does not fetch the references inside SampleRefs; the worker reads the store's memory."""

    @ray.remote(num_cpus=1)
    def read(refs: SampleRefs) -> tuple[list[int], bool]:
        rows: list[Any] = refs.fetch()
        return [int(row.sum()) for row in rows], any(row.flags.owndata or row.flags.writeable for row in rows)

    rows = [[k] * 100_000 for k in range(4)]
    sums, copied = ray.get(read.remote(store(rows, [[3, 1], [0, 2]]).take(np.array([2, 3]))))
    assert sums == [200_000, 300_000]
    assert not copied
