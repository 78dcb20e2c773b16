"""Losses and their gradients against the formulas written out token by token in float64."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from configs.schema import PPOClipLoss, PPOSettings, ReinforceLoss
from workers.rl.advantages import moments
from workers.rl.losses import (
    LossInputs,
    LossOutput,
    PolicyLoss,
    PPOClip,
    explained_variance,
    kl_from_behavior,
    masked_sum,
    next_token,
    pairwise,
    value_losses,
)

torch.set_num_threads(1)
quick = settings(deadline=None, max_examples=40, derandomize=True)
CLIP = 0.2
ADAM = {"lr": 1e-5}
NEEDED = {"prompts": {"path": "prompts.jsonl"}, "steps": 1, "actor_optimizer": ADAM, "critic_optimizer": ADAM}


class Batch:
    """New and old log-probabilities (or values) and advantages (or returns), at random, with nan outside the mask."""

    def __init__(self, seed: int, rows: int, columns: int) -> None:
        random = torch.Generator().manual_seed(seed)
        lengths = torch.randint(1, columns + 1, (rows, 1), generator=random)
        self.mask = torch.arange(columns) < lengths
        old = torch.randn(rows, columns, generator=random)
        new = old + 0.3 * torch.randn(rows, columns, generator=random)
        self.new, self.old, self.target = (
            x.masked_fill(~self.mask, torch.nan) for x in (new, old, torch.randn(rows, columns, generator=random))
        )

    def arguments(self, rows: slice = slice(None)) -> tuple[Tensor, ...]:
        return self.new[rows], self.old[rows], self.target[rows], self.mask[rows]


batches = st.builds(Batch, st.integers(0, 10_000), st.integers(1, 5), st.integers(1, 12))
Loss = Callable[..., LossOutput]


def policy_loss(kind: str) -> Loss:
    """A policy loss with the arguments of a value loss."""

    def loss(new: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, clip: float) -> LossOutput:
        clips = {"clip_low": clip, "clip_high": clip} if kind == "ppo_clip" else {}
        settings = PPOSettings.model_validate(NEEDED | {"loss": {"kind": kind, **clips}}).loss
        unused = torch.full_like(new, torch.nan)  # no loss reads the engine's or the reference's
        return PolicyLoss.of(settings)(LossInputs(new, unused, old, unused, advantages, mask))

    return loss


Formula = Callable[[float, float, float], float]
LOSSES = [
    *(pytest.param(policy_loss(name), id=f"policy-{name}") for name in ("ppo_clip", "reinforce")),
    *(pytest.param(value_losses.get(name), id=f"value-{name}") for name in value_losses.names),
]


def ppo_clip_by_hand(new: float, old: float, advantage: float) -> float:
    ratio = math.exp(new - old)
    return -min(ratio * advantage, min(max(ratio, 1 - CLIP), 1 + CLIP) * advantage)


def reinforce_by_hand(new: float, old: float, advantage: float) -> float:
    return -advantage * new


def clipped_by_hand(new: float, old: float, target: float) -> float:
    limited = min(max(new, old - CLIP), old + CLIP)
    return 0.5 * max((new - target) ** 2, (limited - target) ** 2)


def mse_by_hand(new: float, old: float, target: float) -> float:
    return 0.5 * (new - target) ** 2


@pytest.mark.parametrize(
    ("loss", "by_hand"),
    [
        (policy_loss("ppo_clip"), ppo_clip_by_hand),
        (policy_loss("reinforce"), reinforce_by_hand),
        (value_losses.get("clipped"), clipped_by_hand),
        (value_losses.get("mse"), mse_by_hand),
    ],
)
@quick
@given(batch=batches)
def test_loss_and_gradient_are_the_formula(loss: Loss, by_hand: Formula, batch: Batch) -> None:
    batch.new.requires_grad_()
    found = loss(*batch.arguments(), CLIP).loss
    (gradient,) = torch.autograd.grad(found.sum(), batch.new)
    step = 1e-6
    for row, column in batch.mask.nonzero().tolist():
        new, old, target = (x[row, column].item() for x in (batch.new, batch.old, batch.target))
        assert found[row, column].item() == pytest.approx(by_hand(new, old, target), rel=1e-4, abs=1e-5)
        slope = (by_hand(new + step, old, target) - by_hand(new - step, old, target)) / (2 * step)
        assert gradient[row, column].item() == pytest.approx(slope, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("loss", LOSSES)
@quick
@given(batch=batches)
def test_nothing_leaks_from_outside_the_mask(loss: Loss, batch: Batch) -> None:
    batch.new.requires_grad_()
    parts = loss(*batch.arguments(), CLIP)
    (gradient,) = torch.autograd.grad(parts.loss.sum(), batch.new)
    for x in (parts.loss, gradient, *parts.metrics.values()):
        assert x.isfinite().all()
        assert not x[~batch.mask].any()
    assert not any(x.requires_grad for x in parts.metrics.values())


@pytest.mark.parametrize("loss", LOSSES)
@quick
@given(batch=batches, cut=st.integers(0, 5))
def test_micro_batches_sum_to_the_batch(loss: Loss, batch: Batch, cut: int) -> None:
    def summed(rows: slice) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        new = batch.new[rows].clone().requires_grad_()
        parts = loss(new, *batch.arguments(rows)[1:], CLIP)
        total = masked_sum(parts.loss, batch.mask[rows])
        (gradient,) = torch.autograd.grad(total, new)
        return total.detach(), gradient, {name: masked_sum(x, batch.mask[rows]) for name, x in parts.metrics.items()}

    whole, first, second = (summed(rows) for rows in (slice(None), slice(0, cut), slice(cut, None)))
    torch.testing.assert_close(first[0] + second[0], whole[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.cat([first[1], second[1]]), whole[1])
    for name, value in whole[2].items():
        torch.testing.assert_close(first[2][name] + second[2][name], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
@quick
@given(batch=batches, extra=st.integers(1, 5))
def test_more_padding_changes_nothing(loss: Loss, batch: Batch, extra: int) -> None:
    wide = [torch.nn.functional.pad(x, (0, extra), value=torch.nan) for x in batch.arguments()[:3]]
    padded = loss(*wide, torch.nn.functional.pad(batch.mask, (0, extra)), CLIP)
    assert torch.equal(padded.loss[:, :-extra], loss(*batch.arguments(), CLIP).loss)
    assert not padded.loss[:, -extra:].any()


# ---------------------------------------------------------------- policy


@pytest.mark.parametrize(
    ("ratio", "advantage", "clips"),
    [(1.5, 1.0, True), (1.5, -1.0, False), (0.5, 1.0, False), (0.5, -1.0, True), (1.1, 1.0, False), (1.0, 1.0, False)],
)
def test_clip_removes_the_gradient_only_beyond_the_clip_range(ratio: float, advantage: float, clips: bool) -> None:
    log_probs = torch.tensor([[math.log(ratio)]], requires_grad=True)
    mask = torch.tensor([[True]])
    parts = policy_loss("ppo_clip")(log_probs, torch.zeros(1, 1), torch.tensor([[advantage]]), mask, CLIP)
    (gradient,) = torch.autograd.grad(parts.loss.sum(), log_probs)
    assert parts.metrics["clip_fraction"].item() == clips
    assert gradient.item() == pytest.approx(0.0 if clips else -advantage * ratio)


def test_ppo_clip_on_policy_has_the_gradient_of_reinforce() -> None:
    batch = Batch(seed=1, rows=3, columns=6)
    gradients: list[Tensor] = []
    for name in ("ppo_clip", "reinforce"):
        new = batch.old.clone().requires_grad_()
        loss = policy_loss(name)(new, batch.old, batch.target, batch.mask, CLIP).loss
        gradients.extend(torch.autograd.grad(loss.sum(), new))
    torch.testing.assert_close(*gradients)


def test_the_kl_from_the_behavior_to_the_trained_policy() -> None:
    """Its mean over samples of the old policy, summed exactly over a vocabulary."""
    old, new = torch.randn(2, 1, 13, generator=torch.Generator().manual_seed(4)).log_softmax(-1)
    mask = torch.ones(1, 13, dtype=torch.bool)
    inputs = LossInputs(new.requires_grad_(), old, torch.full_like(old, torch.nan), None, torch.ones(1, 13), mask)
    found = kl_from_behavior(inputs)
    assert not found.requires_grad
    assert (found >= 0).all()
    assert (old.exp() * found).sum().item() == pytest.approx((old.exp() * (old - new)).sum().item(), rel=1e-4)


@pytest.mark.parametrize(("ratio", "advantage", "loss"), [(1.5, 1.0, -1.28), (0.6, -1.0, 0.8), (1.27, 1.0, -1.27)])
def test_each_side_of_the_clip_has_its_own_width(ratio: float, advantage: float, loss: float) -> None:
    """Clip-higher, as in DAPO."""
    one, mask = torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool)
    inputs = LossInputs(one + math.log(ratio), one, one, None, one + advantage, mask)
    assert PPOClip(PPOClipLoss(clip_low=0.2, clip_high=0.28))(inputs).loss.item() == pytest.approx(loss)


def test_the_setting_chooses_the_mean_of_a_loss() -> None:
    assert PolicyLoss.of(PPOClipLoss()).aggregation == "token_mean"
    assert PolicyLoss.of(ReinforceLoss(aggregation="constant")).aggregation == "constant"


def test_registries_hold_the_defaults_of_the_schema() -> None:
    assert isinstance(PolicyLoss.of(PPOSettings.model_fields["loss"].default), PPOClip)
    assert PPOSettings.model_fields["value_loss"].default in value_losses.names


# ---------------------------------------------------------------- value


def test_value_clip_removes_the_gradient_of_a_value_beyond_the_range() -> None:
    values = torch.tensor([[1.0, 0.1]], requires_grad=True)
    mask = torch.ones(1, 2, dtype=torch.bool)
    parts = value_losses.get("clipped")(values, torch.zeros(1, 2), torch.full((1, 2), 2.0), mask, CLIP)
    (gradient,) = torch.autograd.grad(parts.loss.sum(), values)
    assert parts.loss.tolist() == [pytest.approx([0.5 * 1.8**2, 0.5 * 1.9**2])]
    assert parts.metrics["clip_fraction"].tolist() == [[1.0, 0.0]]
    assert gradient.tolist() == [pytest.approx([0.0, -1.9])]


@quick
@given(batches, st.integers(0, 5))
def test_explained_variance_from_the_sums_of_shards(batch: Batch, cut: int) -> None:
    returns, values = batch.target[batch.mask].double(), batch.new[batch.mask].double()
    if len(returns) < 3:
        return
    expected = 1 - (returns - values).var() / returns.var()
    sums = [
        [moments(x[rows], batch.mask[rows]) for x in (batch.target, batch.target - batch.new)]
        for rows in (slice(0, cut), slice(cut, None))
    ]
    found = explained_variance(sums[0][0] + sums[1][0], sums[0][1] + sums[1][1])
    assert found.item() == pytest.approx(expected.item(), rel=1e-3, abs=1e-3)


def test_explained_variance_of_perfect_constant_and_undefined() -> None:
    returns, mask = torch.tensor([[1.0, 2.0, 4.0]]), torch.ones(1, 3, dtype=torch.bool)
    spread, none = moments(returns, mask), moments(torch.ones(1, 3), mask)
    assert explained_variance(spread, moments(returns - returns, mask)).item() == 1
    assert explained_variance(spread, moments(returns - 9.0, mask)).item() == pytest.approx(0)
    assert explained_variance(none, none).isnan()


# ---------------------------------------------------------------- supervised


def test_next_token_is_the_cross_entropy_of_the_completion() -> None:
    logits = torch.randn(2, 4, 7, generator=torch.Generator().manual_seed(0))
    tokens = torch.randint(7, (2, 4), generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[True, True, True, False], [True, False, False, False]])
    log_probs = logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    expected = torch.nn.functional.cross_entropy(logits[mask], tokens[mask], reduction="sum")
    torch.testing.assert_close(masked_sum(next_token(log_probs, mask), mask), expected)
    assert not next_token(log_probs, mask)[~mask].any()


@quick
@given(st.floats(-8, 8), st.floats(-8, 8), st.floats(0, 2), st.floats(0, 1))
def test_pairwise_is_its_formula(chosen: float, rejected: float, margin: float, center: float) -> None:
    found = pairwise(torch.tensor([chosen]), torch.tensor([rejected]), torch.tensor([margin]), center)
    expected = math.log(1 + math.exp(-(chosen - rejected - margin))) + center * (chosen + rejected) ** 2
    assert found.tolist() == [pytest.approx(expected, rel=1e-4, abs=1e-5)]


def test_pairwise_stays_finite_for_far_scores() -> None:
    found = pairwise(torch.tensor([-500.0, 500.0]), torch.tensor([500.0, -500.0]), torch.zeros(2), 0.0)
    assert found.tolist() == [1000.0, 0.0]
