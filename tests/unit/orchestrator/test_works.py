"""What each rank gets of a step: every sample with a score is trained on once, however many ranks there are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from configs.schema import Role, RunConfig
from orchestrator.algorithms.supervised import RewardModel
from orchestrator.run.run_dir import Run
from orchestrator.worker_groups.calls import WorkerGroup
from orchestrator.worker_groups.rollouts import Experience, Rollouts, TokenColumn
from orchestrator.worker_groups.team import Team
from placement import Cluster, make_plan
from workers.api import ValueApi
from workers.data.batching import NO_ROWS
from workers.data.samples import SampleRefs
from workers.data.step_inputs import TrainStepInput
from workers.models.heads import Batch
from workers.training.experience import prepare
from workers.training.schedule import StageStep

CPU = torch.device("cpu")
quick = settings(deadline=None, max_examples=100, derandomize=True)


def team_of(ranks: int, mini_batches: int = 1, samples: int = 64, micro_batch_tokens: int = 60) -> Team:
    """A team whose workers are never asked."""
    adam, data = {"lr": 1e-3}, {"path": "rows.jsonl"}
    ppo = {"prompts": data, "steps": 2, "actor_optimizer": adam, "critic_optimizer": adam}
    ppo |= {"prompts_per_step": samples, "mini_batches": mini_batches, "micro_batch_tokens": micro_batch_tokens}
    config = RunConfig.model_validate({"name": "works", "model": {"path": "m"}, "ppo": ppo})
    team = Team(config, make_plan(config, "ppo", Cluster.parse("1x8cpu")), None, None)
    workers: list[Any] = [None] * ranks
    roles: tuple[Role, ...] = ("actor", "critic", "reference", "reward")
    team.groups = {role: WorkerGroup(role, workers, "here", team.deadlines) for role in roles}
    return team


def experience(scores: list[float], ptx: list[np.ndarray] | None = None) -> Experience:
    """Samples of several lengths; sample i is row i of the only object."""
    count, draw = len(scores), np.random.default_rng(len(scores))
    refs = SampleRefs.of(["chunk"], [np.arange(count)], count)
    column = TokenColumn(refs, np.zeros(count))
    rollouts = Rollouts(
        "prompts",
        prompts=np.arange(count) // 2,
        numbers=np.arange(count) % 2,
        step=1,
        refs=refs,
        prompt_lengths=draw.integers(1, 9, count),
        answer_lengths=draw.integers(1, 30, count),
        ended=np.ones(count, bool),
        versions=frozenset([0]),
    )
    return Experience(rollouts, column, column, np.array(scores), kl_coefficient=0.1, ptx=ptx or [])


def trained(works: list[TrainStepInput]) -> list[list[int]]:
    """The samples of each mini-batch, over all ranks, in order."""
    return [
        sorted(
            int(work.rollouts.where[row, 1])
            for work in works
            for rows in work.mini_batches[k].micro_batches
            for row in rows
        )
        for k in range(len(works[0].mini_batches))
    ]


@pytest.mark.parametrize("ranks", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("mini_batches", [4, 8])
def test_one_missing_score_costs_one_sample(ranks: int, mini_batches: int) -> None:
    scores = [0.5] * 64
    scores[10] = np.nan
    works = team_of(ranks, mini_batches)._works("actor", experience(scores), 1, True)
    found = trained(works)
    assert sorted(row for mini in found for row in mini) == [row for row in range(64) if row != 10]
    assert [len(mini) for mini in found] == [64 // mini_batches] * (mini_batches - 1) + [64 // mini_batches - 1]


@quick
@given(
    st.lists(st.sampled_from([0.5, -1.0, np.nan]), min_size=1, max_size=40).filter(lambda s: not np.isnan(s).all()),
    st.integers(1, 8),
    st.integers(1, 6),
    st.sampled_from([10, 60, 1000]),
)
def test_what_is_trained_on_does_not_depend_on_the_ranks(
    scores: list[float], mini_batches: int, ranks: int, micro_batch_tokens: int
) -> None:
    mini_batches = min(mini_batches, len(scores))
    given_ = experience(scores)
    scored = [row for row, score in enumerate(scores) if not np.isnan(score)]
    alone, works = (
        team_of(n, mini_batches, len(scores), micro_batch_tokens)._works("critic", given_, 1, True) for n in (1, ranks)
    )
    found = trained(works)
    assert len(works) == ranks
    assert sorted(row for mini in found for row in mini) == scored
    assert found == trained(alone)
    assert len(found) == min(mini_batches, len(scored))
    assert max(map(len, found)) - min(map(len, found)) <= 1
    for k, rows in enumerate(found):
        ours = [work.mini_batches[k] for work in works]
        assert len({len(mini.micro_batches) for mini in ours}) == 1, "ranks compute in lockstep"
        assert {mini.tokens for mini in ours} == {int(given_.rollouts.answer_lengths[rows].sum())}
        assert any(len(mini.micro_batches[0]) for mini in ours)
    for work in works:
        mine = work.rollouts.where[:, 1]
        assert len(work.scores) == len(work.groups) == len(work.rollouts) == len(work.reference)
        assert not np.isnan(work.scores).any()
        np.testing.assert_array_equal(work.groups, given_.rollouts.prompts[mine])
        np.testing.assert_array_equal(work.scores, given_.scores[mine])


def test_fewer_samples_than_mini_batches_are_fewer_mini_batches() -> None:
    team = team_of(ranks=4, mini_batches=3, samples=6)
    team.lengths["sft"] = (np.array([3, 4, 5]), np.array([1, 2, 3]))
    scores = [np.nan, 1.0, np.nan, np.nan, 2.0, np.nan]
    works = team._works("actor", experience(scores, [np.array([0, 1]), np.array([2]), np.array([1])]), 1, True)
    assert sorted(trained(works)) == [[1], [4]]
    ptx = [[part.micro_batches for part in (mini.ptx for mini in work.mini_batches) if part] for work in works]
    assert [sorted(int(row) for work in ptx for rows in work[k] for row in rows) for k in (0, 1)] == [[0, 1], [2]]
    assert [mini.ptx.count for mini in works[3].mini_batches if mini.ptx] == [3, 3]


def test_a_rank_without_samples_takes_part_in_sums_and_brings_nothing() -> None:
    team, summed = team_of(ranks=3, samples=2), 0
    assert team.config.ppo is not None

    def total(x: Tensor) -> Tensor:
        nonlocal summed
        summed += 1
        assert not x.any()
        return x + 1.0  # of the other ranks

    works = team._works("actor", experience([0.5, 1.0]), 1, True)
    assert [len(work.rollouts) for work in works] == [1, 1, 0]
    nothing = SampleRefs((), np.empty((0, 2), np.int32))
    answers = prepare(
        replace(works[2], rollouts=nothing, reference=nothing, values=nothing), team.config.ppo, total, CPU
    )
    assert summed == 1
    assert len(answers.samples) == 0
    assert answers.mask.shape == answers.advantages.shape == answers.returns.shape == (0, 1)
    batch = Batch([answers.samples[row] for row in NO_ROWS], CPU)
    assert batch.mask.shape == answers.advantages[NO_ROWS, : batch.mask.shape[1]].shape
    assert all(len(column) == 0 for name, column in answers.arrays([NO_ROWS]).items() if name != "offsets")


def test_a_step_without_any_score_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^step 5: none of the 3 samples has a score: there is nothing to train on$"):
        team_of(ranks=2)._works("actor", experience([np.nan] * 3), 5, True)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("rows", [1, 3, 5])
def test_every_row_is_scored_and_validated_once(ranks: int, rows: int) -> None:
    """Three validation rows on four ranks, too."""
    team, lengths = team_of(ranks), np.array([7, 3, 9, 2, 5])[:rows]
    shards, micro_batches = team._shards("reference", lengths)
    assert sorted(np.concatenate(shards).tolist()) == list(range(rows))
    scored = [row for shard, batches in zip(shards, micro_batches, strict=True) for m in batches for row in shard[m]]
    assert sorted(scored) == list(range(rows))

    team.lengths["rows"] = (lengths, lengths - 1)
    parts = team.parts("actor", "rows", np.arange(rows), 10)
    assert len(parts) == ranks
    assert sorted(int(row) for part in parts for m in part.micro_batches for row in m) == list(range(rows))
    assert {part.count for part in parts} == {int((lengths - 1).sum())}
    assert len({len(part.micro_batches) for part in parts}) == 1


@pytest.mark.parametrize("limit", [1, 59, 60, 200, 100_000])
def test_both_sides_of_a_pair_count_in_a_micro_batch(limit: int) -> None:
    """A pass takes both sides of its pairs, padded to the longest of all."""
    lengths, ranks = np.array([10, 10, 10, 30, 20, 10, 5, 25]), 2
    pairs = {"train": {"path": "pairs.jsonl"}, "optimizer": {"lr": 1e-4}, "micro_batch_tokens": limit}
    config = RunConfig.model_validate({"name": "pairs", "model": {"path": "model"}, "rm": pairs})
    job = RewardModel(Run(config, Path("nowhere")))
    job.context = SimpleNamespace(team=team_of(ranks))
    job.team.lengths["train"] = (lengths, np.ones_like(lengths))
    call = job.call(ValueApi.train_pairs, "train", np.arange(len(lengths)), StageStep(1, 1), (1, 1))
    cut = [rows for rank in range(ranks) for rows in call.requests[rank].args[0].micro_batches]
    assert sorted(np.concatenate(cut).tolist()) == list(range(len(lengths)))
    assert all(len(rows) == 1 or 2 * len(rows) * lengths[rows].max() <= limit for rows in cut)
    assert len(cut) == 2 if limit >= 2 * 4 * 30 else len(cut) > 2
