"""The learning rate of each step against tables that anyone can check."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.schema import OptimizerSettings
from workers.training.schedule import StageStep, learning_rate

quick = settings(deadline=None, max_examples=200, derandomize=True)


def rates(steps: int, **chosen: float | str) -> list[float]:
    """Of every step of a stage, for a peak of 1."""
    optimizer = OptimizerSettings.model_validate({"lr": 1.0, **chosen})
    return [learning_rate(optimizer, StageStep(step, steps)) for step in range(1, steps + 1)]


SIXTH = math.cos(math.pi / 6) ** 2
TABLES = [
    (1, {"warmup": 0.1}, [1.0]),  # the only step learns
    (3, {"warmup": 0.01}, [1.0, 1.0, 1.0]),
    (4, {}, [1.0, 1.0, 1.0, 1.0]),
    (4, {"warmup": 1.0}, [0.25, 0.5, 0.75, 1.0]),
    (5, {"warmup": 0.4}, [0.5, 1.0, 1.0, 1.0, 1.0]),
    (5, {"warmup": 0.3}, [0.5, 1.0, 1.0, 1.0, 1.0]),  # 1.5 steps are 2
    (4, {"schedule": "linear"}, [1.0, 0.75, 0.5, 0.25]),
    (6, {"schedule": "linear", "warmup": 1 / 3}, [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]),
    (2, {"schedule": "cosine"}, [1.0, 0.5]),
    (5, {"schedule": "cosine", "warmup": 0.4}, [0.5, 1.0, 1.0, SIXTH, 1 - SIXTH]),
    (10, {"schedule": "cosine", "warmup": 0.1}, [1.0] + [(1 + math.cos(math.pi * k / 9)) / 2 for k in range(9)]),
]


@pytest.mark.parametrize(("steps", "chosen", "wanted"), TABLES)
def test_rates(steps: int, chosen: dict[str, float | str], wanted: list[float]) -> None:
    assert rates(steps, **chosen) == pytest.approx(wanted)


@quick
@given(
    st.integers(1, 200),
    st.floats(0.0, 1.0),
    st.sampled_from(["constant", "linear", "cosine"]),
)
def test_every_step_learns_and_the_rate_rises_then_falls(steps: int, warmup: float, schedule: str) -> None:
    found = rates(steps, warmup=warmup, schedule=schedule)
    assert all(0 < rate <= 1 for rate in found)
    assert max(found) == 1.0
    top = found.index(1.0)
    assert found[: top + 1] == sorted(found[: top + 1])
    assert found[top:] == sorted(found[top:], reverse=True)


def test_shares_of_the_steps_are_not_rounded_up_for_the_machine_s_rounding() -> None:
    assert 0.07 * 100 > 7
    assert rates(100, warmup=0.07).index(1.0) == 6


@pytest.mark.parametrize("step", [0, 5])
def test_a_step_that_the_stage_does_not_have_is_refused(step: int) -> None:
    with pytest.raises(ValueError, match=rf"^step: was {step}, but the stage has the steps 1 to 4$"):
        learning_rate(OptimizerSettings(lr=1.0), StageStep(step, 4))
