"""Advantages against loops over time in float64."""

from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from configs.schema import GAEAdvantage, PPOSettings, ReinforceAdvantage
from orchestrator.algorithms.reward_shaping import shape_scored, shape_scores
from workers.rl.advantages import (
    GAE,
    Reinforce,
    TokenAdvantage,
    mean_and_variance,
    moments,
    token_rewards,
    whiten,
)
from workers.rl.losses import value_losses
from workers.rl.registry import Registry, UnknownNameError

torch.set_num_threads(1)
quick = settings(deadline=None, max_examples=40, derandomize=True)
discounts = st.sampled_from([0.0, 0.5, 0.95, 0.99, 1.0])
Estimator = Callable[..., tuple[Tensor, Tensor]]
gae, reinforce = GAE(GAEAdvantage()), Reinforce(ReinforceAdvantage())
ESTIMATORS: list[Estimator] = [gae, reinforce]


class Batch:
    """Random rewards and values, with nan outside the mask."""

    def __init__(self, seed: int, rows: int, columns: int) -> None:
        random = torch.Generator().manual_seed(seed)
        self.lengths = torch.randint(1, columns + 1, (rows,), generator=random)
        self.mask = torch.arange(columns) < self.lengths[:, None]
        self.rewards = torch.randn(rows, columns, generator=random).masked_fill(~self.mask, torch.nan)
        self.values = torch.randn(rows, columns, generator=random).masked_fill(~self.mask, torch.nan)
        self.groups = torch.arange(rows)


batches = st.builds(Batch, st.integers(0, 10_000), st.integers(1, 6), st.integers(1, 33))


def gae_by_loop(batch: Batch, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    advantages, returns = torch.zeros(2, *batch.mask.shape, dtype=torch.float64)
    for row, length in enumerate(batch.lengths.tolist()):
        next_value = next_advantage = 0.0
        for t in reversed(range(length)):
            value = batch.values[row, t].item()
            delta = batch.rewards[row, t].item() + gamma * next_value - value
            next_advantage = delta + gamma * lam * next_advantage
            advantages[row, t], returns[row, t] = next_advantage, next_advantage + value
            next_value = value
    return advantages, returns


def reinforce_by_loop(batch: Batch, gamma: float) -> tuple[Tensor, Tensor]:
    returns = torch.zeros(batch.mask.shape, dtype=torch.float64)
    for row, length in enumerate(batch.lengths.tolist()):
        to_go = 0.0
        for t in reversed(range(length)):
            to_go = batch.rewards[row, t].item() + gamma * to_go
            returns[row, t] = to_go
    baseline = sum(returns[:, 0].tolist()) / len(returns)
    return torch.where(batch.mask, returns - baseline, 0.0), returns


def assert_same(results: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    for ours, oracle in zip(results, expected, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, oracle.float(), rtol=1e-5, atol=1e-5)


@quick
@given(batches, discounts, discounts)
def test_gae_is_the_loop(batch: Batch, gamma: float, lam: float) -> None:
    results = gae(batch.rewards, batch.values, batch.mask, gamma, lam, batch.groups)
    assert_same(results, gae_by_loop(batch, gamma, lam))


@quick
@given(batches, discounts)
def test_reinforce_is_the_loop(batch: Batch, gamma: float) -> None:
    results = reinforce(batch.rewards, None, batch.mask, gamma, 0.3, batch.groups)
    assert_same(results, reinforce_by_loop(batch, gamma))


def test_gae_by_hand() -> None:
    mask = torch.tensor([[True, True, False]])
    advantages, returns = gae(
        torch.tensor([[1.0, 2.0, 9.0]]), torch.tensor([[0.5, 0.25, 9.0]]), mask, 0.5, 0.5, torch.tensor([0])
    )
    # delta: 1 + 0.5 * 0.25 - 0.5 = 0.625, and 2 - 0.25 = 1.75 at the end, after which the value is 0.
    assert advantages.tolist() == [[0.625 + 0.25 * 1.75, 1.75, 0.0]]
    assert returns.tolist() == [[0.625 + 0.25 * 1.75 + 0.5, 2.0, 0.0]]


def test_gae_over_a_long_answer_keeps_its_precision() -> None:
    batch = Batch(seed=3, rows=2, columns=5000)
    batch.lengths[0] = 5000
    batch.mask[0] = True
    batch.rewards[0], batch.values[0] = 0.1, 0.7
    results = gae(batch.rewards, batch.values, batch.mask, 1.0, 1.0, batch.groups)
    torch.testing.assert_close(results[0], gae_by_loop(batch, 1.0, 1.0)[0].float(), rtol=1e-6, atol=1e-4)


def test_gae_without_critic_is_refused() -> None:
    batch = Batch(seed=0, rows=1, columns=2)
    with pytest.raises(ValueError, match=r"ppo\.advantage: 'gae' needs the values of a critic"):
        gae(batch.rewards, None, batch.mask, 1.0, 1.0, batch.groups)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@quick
@given(batch=batches, gamma=discounts, lam=discounts, extra=st.integers(1, 40))
def test_more_padding_changes_nothing(estimator: Estimator, batch: Batch, gamma: float, lam: float, extra: int) -> None:
    columns = batch.mask.shape[1]
    wide = [torch.nn.functional.pad(x, (0, extra), value=torch.nan) for x in (batch.rewards, batch.values)]
    padded = estimator(*wide, torch.nn.functional.pad(batch.mask, (0, extra)), gamma, lam, batch.groups)
    for x, y in zip(estimator(batch.rewards, batch.values, batch.mask, gamma, lam, batch.groups), padded, strict=True):
        assert torch.equal(x, y[:, :columns])
        assert not y[:, columns:].any()


@pytest.mark.parametrize("estimator", ESTIMATORS)
@quick
@given(batch=batches, gamma=discounts, lam=discounts, seed=st.integers(0, 99))
def test_order_of_rows_does_not_matter(estimator: Estimator, batch: Batch, gamma: float, lam: float, seed: int) -> None:
    order = torch.randperm(len(batch.mask), generator=torch.Generator().manual_seed(seed))
    rows = [x[order] for x in (batch.rewards, batch.values, batch.mask)]
    permuted = estimator(*rows, gamma, lam, batch.groups[order])
    for x, y in zip(
        estimator(batch.rewards, batch.values, batch.mask, gamma, lam, batch.groups), permuted, strict=True
    ):
        torch.testing.assert_close(x[order], y, rtol=1e-6, atol=1e-6)


def on_ranks(batch: Batch, cuts: list[int], compute: Callable[..., tuple[Tensor, ...]]) -> list[Tensor]:
    """The joined results of ranks with unequal parts of the rows. compute(part, total): the computation of one rank, which may
    call `total` once."""
    parts = [slice(a, b) for a, b in pairwise([0, *sorted(cuts), len(batch.mask)])]
    shards = [
        SimpleNamespace(
            rewards=batch.rewards[rows], values=batch.values[rows], mask=batch.mask[rows], groups=batch.groups[rows]
        )
        for rows in parts
    ]
    sums: list[Tensor] = []

    def note(x: Tensor) -> Tensor:
        sums.append(x)
        return x

    for shard in shards:
        compute(shard, note)
    results = [compute(shard, lambda x: sum(sums, torch.zeros_like(x))) for shard in shards]
    return [torch.cat(columns) for columns in zip(*results, strict=True)]


cuts = st.lists(st.integers(0, 6), max_size=4)
"""First rows of up to five ranks; some ranks have no rows."""


@pytest.mark.parametrize("estimator", ESTIMATORS)
@quick
@given(batch=batches, where=cuts)
def test_ranks_of_unequal_parts_are_one(estimator: Estimator, batch: Batch, where: list[int]) -> None:
    def estimate(part: Any, total: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        return estimator(part.rewards, part.values, part.mask, 0.9, 0.8, part.groups, total)

    results = on_ranks(batch, [min(cut, len(batch.mask)) for cut in where], estimate)
    whole = estimator(batch.rewards, batch.values, batch.mask, 0.9, 0.8, batch.groups)
    for ours, expected in zip(results, whole, strict=True):
        torch.testing.assert_close(ours, expected)


@quick
@given(batch=batches, where=cuts)
def test_ranks_of_unequal_parts_whiten_alike(batch: Batch, where: list[int]) -> None:
    def whitened(part: Any, total: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        return (whiten(part.values, part.mask, *mean_and_variance(total(moments(part.values, part.mask)))),)

    [results] = on_ranks(batch, [min(cut, len(batch.mask)) for cut in where], whitened)
    torch.testing.assert_close(results, whitened(batch, lambda x: x)[0])


def test_a_row_without_tokens_does_not_count() -> None:
    rewards, mask = torch.tensor([[1.0, 1.0], [5.0, 5.0]]), torch.tensor([[True, True], [False, False]])
    advantages, returns = reinforce(rewards, None, mask, 1.0, 1.0, torch.tensor([0, 1]))
    assert advantages.tolist() == [[0.0, -1.0], [0.0, 0.0]]
    assert returns.tolist() == [[2.0, 1.0], [0.0, 0.0]]


# ---------------------------------------------------------------- whitening


@quick
@given(batches, st.floats(-100, 100))
def test_whitened_has_mean_0_and_deviation_1(batch: Batch, offset: float) -> None:
    if batch.mask.sum() < 2:
        return
    x = batch.values + offset
    white = whiten(x, batch.mask, *mean_and_variance(moments(x, batch.mask)))
    assert white.dtype == torch.float32
    assert not white[~batch.mask].any()
    real = white[batch.mask].double()
    assert real.mean().item() == pytest.approx(0, abs=1e-3)
    assert real.std(correction=0).item() == pytest.approx(1, abs=1e-3)


def test_constants_whiten_to_zero() -> None:
    x, mask = torch.full((2, 3), 0.3), torch.ones(2, 3, dtype=torch.bool)
    assert whiten(x, mask, *mean_and_variance(moments(x, mask))).abs().max() < 1e-3


@quick
@given(batches, st.integers(0, 6))
def test_moments_of_shards_add_up(batch: Batch, cut: int) -> None:
    shards = [moments(batch.values[rows], batch.mask[rows]) for rows in (slice(0, cut), slice(cut, None))]
    real = batch.values[batch.mask].double()
    expected = torch.tensor([len(real), sum(real.tolist()), sum(x * x for x in real.tolist())], dtype=torch.float64)
    torch.testing.assert_close(shards[0] + shards[1], expected)


# ---------------------------------------------------------------- rewards


@quick
@given(batches, st.floats(0, 2))
def test_token_rewards_are_kl_at_each_token_and_the_score_at_the_last(batch: Batch, coefficient: float) -> None:
    scores = torch.arange(1.0, len(batch.mask) + 1)
    expected = torch.zeros(batch.mask.shape, dtype=torch.float64)
    for row, length in enumerate(batch.lengths.tolist()):
        for t in range(length):
            expected[row, t] = -coefficient * batch.values[row, t].item()
        expected[row, length - 1] += scores[row].item()
    rewards = token_rewards(scores, batch.values, batch.mask, coefficient)
    torch.testing.assert_close(rewards, expected.float())


def shaping(**changes: float) -> PPOSettings:
    needed = {"prompts": {"path": "prompts.jsonl"}, "steps": 1}
    optimizers = {"actor_optimizer": {"lr": 1e-5}, "critic_optimizer": {"lr": 1e-5}}
    return PPOSettings.model_validate(needed | optimizers | changes)


SCORES, ENDED = np.array([1.0, 3.0, -2.0, 10.0], dtype=np.float32), np.array([True, False, True, True])


def test_scores_pass_unshaped_by_default() -> None:
    shaped = shape_scores(SCORES, ENDED, shaping())
    assert shaped.dtype == np.float32
    assert shaped.tolist() == SCORES.tolist()


def test_scores_are_whitened_over_the_step() -> None:
    shaped = shape_scores(SCORES, ENDED, shaping(whiten_rewards=True))
    assert shaped.mean() == pytest.approx(0, abs=1e-6)
    assert shaped.std() == pytest.approx(1, abs=1e-6)
    assert np.argsort(shaped).tolist() == np.argsort(SCORES).tolist()
    assert shape_scores(np.full(3, 0.1), np.ones(3, bool), shaping(whiten_rewards=True)) == pytest.approx(0, abs=1e-6)


def test_clip_comes_before_the_penalty() -> None:
    shaped = shape_scores(SCORES, ENDED, shaping(reward_clip=2.5, missing_eos_penalty=1.0))
    assert shaped.tolist() == [1.0, 1.5, -2.0, 2.5]


def test_whitening_comes_before_clip_and_penalty() -> None:
    settings = shaping(whiten_rewards=True, reward_clip=1.0, missing_eos_penalty=0.5)
    white = (SCORES - 3.0) / np.sqrt(np.mean([4.0, 0.0, 25.0, 49.0]))
    expected = np.clip(white, -1, 1) - [0.0, 0.5, 0.0, 0.0]
    np.testing.assert_allclose(shape_scores(SCORES, ENDED, settings), expected, rtol=1e-6)


def test_whitening_does_not_take_the_penalty_back() -> None:
    shaped = shape_scores(SCORES, np.zeros(4, bool), shaping(whiten_rewards=True, missing_eos_penalty=0.5))
    assert shaped.mean() == pytest.approx(-0.5, abs=1e-6)


def test_answers_without_a_score_are_left_out_of_the_shaping() -> None:
    settings = shaping(whiten_rewards=True, missing_eos_penalty=0.5)
    holes = np.array([np.nan, *SCORES, np.nan])
    shaped = shape_scored(holes, np.array([False, *ENDED, True]), settings)
    assert shaped.dtype == np.float32
    assert np.isnan(shaped[[0, -1]]).all()
    assert shaped[1:-1].tolist() == shape_scores(SCORES, ENDED, settings).tolist()


# ---------------------------------------------------------------- registry


def test_an_unknown_name_lists_the_entries() -> None:
    with pytest.raises(UnknownNameError) as error:
        value_losses.get("clippd")
    assert str(error.value) == (
        "ppo.value_loss: 'clippd' is not registered; it may be clipped, mse; did you mean 'clipped'?"
    )


def test_registry_takes_a_users_function_once() -> None:
    registry: Registry[object] = Registry("ppo.value_loss")

    @registry.register("mine")
    def mine() -> None: ...

    assert registry.get("mine") is mine
    assert registry.names == ["mine"]
    with pytest.raises(ValueError, match=r"ppo\.value_loss: the name 'mine' is registered already"):
        registry.register("mine")(mine)


def test_the_default_is_gae() -> None:
    assert isinstance(TokenAdvantage.of(PPOSettings.model_fields["advantage"].default), GAE)
