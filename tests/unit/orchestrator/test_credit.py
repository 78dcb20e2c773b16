"""Advantages per answer: means and deviations of groups against a loop, unscored answers left out."""

from __future__ import annotations

from statistics import fmean, pstdev, stdev
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.schema import AnswerAdvantageSettings, PPOSettings
from orchestrator.algorithms.credit import AnswerScores, answer_advantages, group_mean, group_std

ADAM = {"lr": 1e-5}
PPO: dict[str, Any] = {"prompts": {"path": "p"}, "steps": 1, "actor_optimizer": ADAM, "critic": False}


@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 4), st.floats(-9, 9) | st.just(np.nan)), min_size=1, max_size=12))
def test_means_and_deviations_of_groups_are_the_loop(answers: list[tuple[int, float]]) -> None:
    groups, x = np.array([group for group, _ in answers]), np.array([value for _, value in answers])
    mean, unbiased, biased = group_mean(x, groups), group_std(x, groups), group_std(x, groups, ddof=0)
    for i, group in enumerate(groups):
        known = [value for value in x[groups == group].tolist() if not np.isnan(value)]
        assert mean[i] == pytest.approx(fmean(known) if known else np.nan, abs=1e-9, nan_ok=True)
        assert unbiased[i] == pytest.approx(stdev(known) if len(known) > 1 else 0.0, abs=1e-6)
        assert biased[i] == pytest.approx(pstdev(known) if known else 0.0, abs=1e-6)


def scores(*rewards: float) -> AnswerScores:
    return AnswerScores(np.array(rewards), np.zeros(len(rewards), int), np.ones(len(rewards)), {})


def test_advantages_per_token_are_not_made_here() -> None:
    assert answer_advantages(PPOSettings.model_validate(PPO), scores(1.0)) is None


class Settings(AnswerAdvantageSettings):
    kind: str = "bad"


def test_a_scored_answer_without_an_advantage_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from orchestrator.algorithms.credit import AnswerAdvantage

    class Bad(AnswerAdvantage):
        def __call__(self, scores: AnswerScores) -> np.ndarray:
            return np.where(scores.rewards > 1, np.inf, scores.rewards)

    monkeypatch.setitem(AnswerAdvantage.kinds, "bad", Bad)
    ppo = PPOSettings.model_validate(PPO).model_copy(update={"advantage": Settings()})
    found = answer_advantages(ppo, scores(0.5, np.nan))
    assert found is not None and found.tolist() == [0.5, 0.0]
    with pytest.raises(
        ValueError, match=r"^ppo\.advantage: bad gave no finite advantage for 1 responses with a score$"
    ):
        answer_advantages(ppo, scores(0.5, 2.0))
