"""KL estimates against the exact sum over a small vocabulary; controllers by direction and by hand."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.schema import AdaptiveKL, FixedKL
from orchestrator.algorithms.kl_controller import AdaptiveController, FixedController, make_controller
from workers.rl.kl import KLEstimator, kl_estimate

torch.set_num_threads(1)
quick = settings(deadline=None, max_examples=60, derandomize=True)
seeds = st.integers(0, 10_000)


@pytest.mark.parametrize(
    ("kind", "formula"),
    [("k1", lambda x: x), ("k2", lambda x: x * x / 2), ("k3", lambda x: math.exp(-x) - 1 + x)],
)
def test_estimates_are_their_formulas(kind: KLEstimator, formula: Callable[[float], float]) -> None:
    log_ratio = torch.linspace(-5, 5, 101).reshape(1, -1)
    expected = torch.tensor([[formula(x) for x in log_ratio[0].tolist()]])
    torch.testing.assert_close(kl_estimate(log_ratio, kind), expected)


@pytest.mark.parametrize("kind", ["k1", "k3"])
@quick
@given(seed=seeds)
def test_k1_and_k3_are_unbiased(kind: KLEstimator, seed: int) -> None:
    """The mean over samples of the actor, taken exactly as a sum over the vocabulary, is the KL."""
    logits = torch.randn(2, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    actor, reference = logits.log_softmax(-1)
    exact = sum(math.exp(p) * (p - q) for p, q in zip(actor.tolist(), reference.tolist(), strict=True))
    mean = (actor.exp() * kl_estimate(actor - reference, kind)).sum().item()
    assert mean == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
@quick
@given(seed=seeds)
def test_what_the_estimates_pull_towards_as_losses(kind: KLEstimator, seed: int) -> None:
    """Their gradients on samples of the actor, in the mean: none, that of KL(actor | reference), of KL(reference | actor)."""
    random = torch.Generator().manual_seed(seed)
    logits = torch.randn(11, dtype=torch.float64, generator=random, requires_grad=True)
    actor = logits.log_softmax(-1)
    reference = torch.randn(11, dtype=torch.float64, generator=random).log_softmax(-1)

    def gradient(loss: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(loss, logits, retain_graph=True)[0]

    mean = gradient((actor.detach().exp() * kl_estimate(actor - reference, kind)).sum())
    wanted = {
        "k1": torch.zeros(11, dtype=torch.float64),
        "k2": gradient((actor.exp() * (actor - reference)).sum()),
        "k3": gradient((reference.exp() * (reference - actor)).sum()),
    }
    torch.testing.assert_close(mean, wanted[kind])


def test_k2_is_close_where_the_policies_are() -> None:
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(11, dtype=torch.float64, generator=random)
    actor = logits.log_softmax(-1)
    reference = (logits + 0.01 * torch.randn(11, dtype=torch.float64, generator=random)).log_softmax(-1)
    exact = (actor.exp() * (actor - reference)).sum().item()
    assert (actor.exp() * kl_estimate(actor - reference, "k2")).sum().item() == pytest.approx(exact, rel=0.02)


@quick
@given(st.floats(-20, 20, width=32))
def test_k3_and_k2_are_never_negative(x: float) -> None:
    log_ratio = torch.tensor([x], dtype=torch.float32)
    assert kl_estimate(log_ratio, "k2") >= 0
    assert kl_estimate(log_ratio, "k3") >= -1e-6 * abs(x)


def test_k3_keeps_its_precision_near_zero() -> None:
    assert kl_estimate(torch.tensor([1e-3]), "k3").item() == pytest.approx(5e-7, rel=0.01)


# ---------------------------------------------------------------- controllers


@quick
@given(st.floats(1e-4, 10), st.floats(1e-3, 5), st.integers(1, 10_000), st.floats(-1, 20), st.integers(1, 10_000))
def test_adaptive_coefficient_rises_above_the_target_and_falls_below_it(
    coefficient: float, target: float, horizon: int, kl: float, samples: int
) -> None:
    controller = AdaptiveController(coefficient, target, horizon)
    controller.update(kl, samples)
    if kl > target:
        assert coefficient <= controller.coefficient <= 1.2 * coefficient * (1 + 1e-12)
    else:
        assert coefficient >= controller.coefficient >= 0.8 * coefficient * (1 - 1e-12)
    if abs(kl / target - 1) > 0.01:
        assert controller.coefficient != coefficient


def test_adaptive_controller_by_hand() -> None:
    controller = AdaptiveController(coefficient=0.1, target=0.5, horizon=1000)
    controller.update(kl=0.55, samples=100)
    assert controller.coefficient == pytest.approx(0.1 * (1 + 0.1 * 0.1))
    controller.update(kl=5.0, samples=100)
    assert controller.coefficient == pytest.approx(0.1 * (1 + 0.1 * 0.1) * (1 + 0.2 * 0.1))


def test_adaptive_controller_brings_a_responsive_kl_to_its_target() -> None:
    controller = AdaptiveController(coefficient=1.0, target=0.1, horizon=200)
    for _ in range(300):
        controller.update(kl=0.02 / controller.coefficient, samples=64)
    assert 0.02 / controller.coefficient == pytest.approx(0.1, rel=0.01)


def test_adaptive_controller_refuses_nan() -> None:
    with pytest.raises(ValueError, match="KL to the reference is nan"):
        AdaptiveController(0.1, 0.1, 100).update(math.nan, 1)


def test_state_resumes() -> None:
    settings = AdaptiveKL(coefficient=0.3, target=0.2, horizon=50)
    controller, resumed = make_controller(settings), make_controller(settings)
    controller.update(0.5, 10)
    resumed.load(controller.state())
    for each in (controller, resumed):
        each.update(0.1, 10)
    assert controller.coefficient == resumed.coefficient != 0.3


def test_fixed_stays() -> None:
    controller = make_controller(FixedKL(coefficient=0.05))
    assert isinstance(controller, FixedController)
    controller.update(9.0, 100)
    controller.load(AdaptiveController(7.0, 1.0, 1).state())
    assert controller.coefficient == 0.05
