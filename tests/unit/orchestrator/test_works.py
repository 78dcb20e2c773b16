"""Each rank's part of a step: every sample with a score is trained on once, for any number of ranks."""

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

from configs.schema import PPOSettings, RunConfig
from orchestrator.algorithms.supervised import RewardModel
from orchestrator.run.run_dir import Run
from orchestrator.worker_groups.calls import WorkerGroup
from orchestrator.worker_groups.rollouts import Experience, Rollouts, TokenColumn
from orchestrator.worker_groups.sharding import (
    in_order,
    shard_samples,
    share_prompts,
    supervised_batches,
    train_step_inputs,
)
from orchestrator.worker_groups.team import Team
from placement import Cluster, make_plan
from workers.api import ValueApi
from workers.data.batching import NO_ROWS
from workers.data.samples import SampleRefs
from workers.data.step_inputs import KLTerm, TrainStepInput
from workers.models.heads import Batch
from workers.training.experience import prepare
from workers.training.schedule import StageStep

CPU = torch.device("cpu")
SEED = (0, 1)
quick = settings(deadline=None, max_examples=100, derandomize=True)


def ppo_settings(mini_batches: int = 1, samples: int = 64, micro_batch_tokens: int = 60) -> PPOSettings:
    adam = {"lr": 1e-3}
    ppo = {"prompts": {"path": "rows.jsonl"}, "steps": 2, "actor_optimizer": adam, "critic_optimizer": adam}
    ppo |= {"prompts_per_step": samples, "mini_batches": mini_batches, "micro_batch_tokens": micro_batch_tokens}
    return PPOSettings.model_validate(ppo)


def experience(scores: list[float], step: int = 1) -> Experience:
    """Samples of several lengths; sample i is row i of the only object."""
    count, draw = len(scores), np.random.default_rng(len(scores))
    refs = SampleRefs.of(["chunk"], [np.arange(count)], count)
    column = TokenColumn(refs, np.zeros(count))
    rollouts = Rollouts(
        "prompts",
        prompts=np.arange(count) // 4,
        groups=np.arange(count) // 2,
        numbers=np.arange(count) % 2,
        step=step,
        refs=refs,
        prompt_lengths=draw.integers(1, 9, count),
        answer_lengths=(answer_lengths := draw.integers(1, 30, count)),
        trained_tokens=(answer_lengths + 1) // 2,
        ended=np.ones(count, bool),
        min_versions=np.zeros(count, int),
        max_versions=np.zeros(count, int),
    )
    return Experience(rollouts, column, column, np.array(scores), KLTerm())


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
    works = train_step_inputs(experience(scores), ppo_settings(mini_batches), ranks, SEED)
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
def test_the_trained_samples_do_not_depend_on_the_number_of_ranks(
    scores: list[float], mini_batches: int, ranks: int, micro_batch_tokens: int
) -> None:
    mini_batches = min(mini_batches, len(scores))
    advantages = np.random.default_rng(len(scores)).normal(size=len(scores))
    given_ = replace(experience(scores), advantages=advantages)
    scored = [row for row, score in enumerate(scores) if not np.isnan(score)]
    ppo = ppo_settings(mini_batches, len(scores), micro_batch_tokens)
    alone, works = (train_step_inputs(given_, ppo, n, SEED) for n in (1, ranks))
    found = trained(works)
    assert len(works) == ranks
    assert sorted(row for mini in found for row in mini) == scored
    assert found == trained(alone)
    assert len(found) == min(mini_batches, len(scored))
    assert max(map(len, found)) - min(map(len, found)) <= 1
    for k, rows in enumerate(found):
        ours = [work.mini_batches[k] for work in works]
        assert len({len(mini.micro_batches) for mini in ours}) == 1, "ranks compute in lockstep"
        assert {mini.tokens for mini in ours} == {int(given_.rollouts.trained_tokens[rows].sum())}
        assert any(len(mini.micro_batches[0]) for mini in ours)
    for work in works:
        mine = work.rollouts.where[:, 1]
        assert work.reference is not None
        assert len(work.scores) == len(work.groups) == len(work.rollouts) == len(work.reference)
        assert not np.isnan(work.scores).any()
        np.testing.assert_array_equal(work.groups, given_.rollouts.groups[mine])
        np.testing.assert_array_equal(work.scores, given_.scores[mine])
        np.testing.assert_array_equal(work.advantages, advantages[mine].astype(np.float32))
    groups, tokens = given_.rollouts.groups, given_.rollouts.trained_tokens
    for k, rows in enumerate(found):
        assert {mini.sequences for mini in (work.mini_batches[k] for work in works)} == {len(rows)}
        assert {mini.prompts for mini in (work.mini_batches[k] for work in works)} == {
            len({groups[row] for row in rows})
        }
        for work in works:
            for own in np.concatenate(work.mini_batches[k].micro_batches):
                row = work.rollouts.where[own, 1]
                assert work.prompt_tokens[own] == sum(tokens[i] for i in rows if groups[i] == groups[row])


def test_fewer_samples_than_mini_batches_are_fewer_mini_batches() -> None:
    lengths, trained_tokens = np.array([3, 4, 5]), np.array([1, 2, 3])
    beside = [
        supervised_batches("sft", rows, lengths, trained_tokens, 4, 60)
        for rows in (np.array([0, 1]), np.array([2]), np.array([1]))
    ]
    scores = [np.nan, 1.0, np.nan, np.nan, 2.0, np.nan]
    works = train_step_inputs(experience(scores), ppo_settings(mini_batches=3, samples=6), 4, SEED, ptx=beside)
    assert sorted(trained(works)) == [[1], [4]]
    ptx = [[part.micro_batches for part in (mini.ptx for mini in work.mini_batches) if part] for work in works]
    assert [sorted(int(row) for work in ptx for rows in work[k] for row in rows) for k in (0, 1)] == [[0, 1], [2]]
    assert [mini.ptx.count for mini in works[3].mini_batches if mini.ptx] == [3, 3]


def test_a_rank_without_samples_takes_part_in_sums_with_zeros() -> None:
    ppo, summed = ppo_settings(samples=2), 0

    def total(x: Tensor) -> Tensor:
        nonlocal summed
        summed += 1
        assert not x.any()
        return x + 1.0  # of the other ranks

    works = train_step_inputs(experience([0.5, 1.0]), ppo, 3, SEED)
    assert [len(work.rollouts) for work in works] == [1, 1, 0]
    nothing = SampleRefs((), np.empty((0, 2), np.int32))
    answers = prepare(replace(works[2], rollouts=nothing, reference=nothing, values=nothing), ppo, total, CPU)
    assert summed == 1
    assert len(answers.samples) == 0
    assert answers.returns is not None
    assert answers.mask.shape == answers.advantages.shape == answers.returns.shape == (0, 1)
    batch = Batch([answers.samples[row] for row in NO_ROWS], CPU)
    assert batch.mask.shape == answers.advantages[NO_ROWS, : batch.mask.shape[1]].shape
    assert all(len(column) == 0 for name, column in answers.arrays([NO_ROWS]).items() if name != "offsets")


def test_a_step_without_any_score_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^step 5: none of the 3 samples has a score: there is nothing to train on$"):
        train_step_inputs(experience([np.nan] * 3, step=5), ppo_settings(), 2, SEED)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("rows", [1, 3, 5])
def test_every_row_is_scored_and_validated_once(ranks: int, rows: int) -> None:
    """Three validation rows on four ranks, too."""
    lengths = np.array([7, 3, 9, 2, 5])[:rows]
    shards, micro_batches = shard_samples(lengths, ranks, 60)
    assert sorted(np.concatenate(shards).tolist()) == list(range(rows))
    scored = [row for shard, batches in zip(shards, micro_batches, strict=True) for m in batches for row in shard[m]]
    assert sorted(scored) == list(range(rows))

    parts = supervised_batches("rows", np.arange(rows), lengths, lengths - 1, ranks, 10)
    assert len(parts) == ranks
    assert sorted(int(row) for part in parts for m in part.micro_batches for row in m) == list(range(rows))
    assert {part.count for part in parts} == {int((lengths - 1).sum())}
    assert len({len(part.micro_batches) for part in parts}) == 1


@quick
@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 5))
def test_every_prompt_goes_to_the_engine_with_the_fewest_tokens(lengths: list[int], engines: int) -> None:
    shares = share_prompts(np.array(lengths, int), engines, 8)
    assert len(shares) == engines
    assert sorted(int(i) for share in shares for i in share) == list(range(len(lengths)))
    assert all((np.diff(share) > 0).all() for share in shares)
    tokens = [sum(lengths[i] + 8 for i in share) for share in shares]
    assert max(tokens) - min(tokens) <= max(lengths, default=0) + 8


@quick
@given(st.permutations(range(9)), st.integers(0, 9))
def test_results_of_ranks_are_put_back_in_order(samples: list[int], cut: int) -> None:
    shards = [np.array(rows, int) for rows in (samples[:cut], samples[cut:])]
    assert in_order(shards, [shard * 2 for shard in shards], 9).tolist() == [2 * i for i in range(9)]


@pytest.mark.parametrize("limit", [1, 59, 60, 200, 100_000])
def test_both_sides_of_a_pair_count_in_a_micro_batch(limit: int) -> None:
    """A pass takes both sides of its pairs, padded to the longest of all."""
    lengths, ranks = np.array([10, 10, 10, 30, 20, 10, 5, 25]), 2
    pairs = {"train": {"path": "pairs.jsonl"}, "optimizer": {"lr": 1e-4}, "micro_batch_tokens": limit}
    config = RunConfig.model_validate({"name": "pairs", "model": {"path": "model"}, "rm": pairs})
    job = RewardModel(Run(config, Path("nowhere")))
    team = Team(config, make_plan(config, "rm", Cluster.parse("1x8cpu")), None, None)
    workers: list[Any] = [None] * ranks
    team.groups["reward"] = WorkerGroup("reward", workers, "here", team.deadlines)
    job.context = SimpleNamespace(team=team)
    job.team.lengths["train"] = (lengths, np.ones_like(lengths))
    call = job.call(ValueApi.train_pairs, "train", np.arange(len(lengths)), StageStep(1, 1), (1, 1))
    cut = [rows for rank in range(ranks) for rows in call.requests[rank].args[0].micro_batches]
    assert sorted(np.concatenate(cut).tolist()) == list(range(len(lengths)))
    assert all(len(rows) == 1 or 2 * len(rows) * lengths[rows].max() <= limit for rows in cut)
    assert len(cut) == 2 if limit >= 2 * 4 * 30 else len(cut) > 2
