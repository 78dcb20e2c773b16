"""Answers to held-out prompts: their rewards, an independent judge's scores, their distance from the reference."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from configs.schema import PPOSettings
from orchestrator.calls import together
from orchestrator.integrity import write_text, writing
from orchestrator.intervals import distinct_share, mean_interval
from orchestrator.team import Team
from workers.functions import RewardError
from workers.scored import Scored

DATA = "evaluation"


@dataclass(frozen=True)
class Evaluation:
    """One answer to each held-out prompt; arrays are [prompts]."""

    prompts: list[str]
    answers: list[str]
    reward: np.ndarray
    judges: dict[str, np.ndarray]
    kl: np.ndarray
    """Nats per token of each answer."""
    tokens: np.ndarray

    def metrics(self) -> dict[str, float]:
        scored = self.reward[~np.isnan(self.reward)]
        interval = mean_interval(scored.tolist())
        return {
            "evaluation/reward": interval.mean,
            "evaluation/reward_ci_low": interval.low,
            "evaluation/reward_ci_high": interval.high,
            "evaluation/reward_std": float(scored.std(ddof=1)) if len(scored) > 1 else 0.0,
            "evaluation/kl": float((self.kl * self.tokens).sum() / self.tokens.sum()),
            "evaluation/length": float(self.tokens.mean()),
            "evaluation/distinct": distinct_share(self.answers),
            **{f"evaluation/{name}": float(np.nanmean(scores)) for name, scores in self.judges.items()},
        }

    def write(self, path: Path) -> None:
        """A JSON line for each prompt. Raises DiskError."""
        rows = [
            {
                "prompt": prompt,
                "answer": answer,
                "reward": _or_null(self.reward[i]),
                "judges": {name: _or_null(scores[i]) for name, scores in self.judges.items()},
                "kl": float(self.kl[i]),
                "tokens": int(self.tokens[i]),
            }
            for i, (prompt, answer) in enumerate(zip(self.prompts, self.answers, strict=True))
        ]
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def weighted_sum(scores: Mapping[str, Scored], ppo: PPOSettings) -> np.ndarray:
    """[samples] the reward: each source times its weight; nan where one gave no score.

    Raises RewardError where more than `ppo.max_unscored` of the samples lack a score.
    """
    reward: np.ndarray = np.sum([source.weight * scores[source.name].values for source in ppo.rewards], axis=0)
    lacking = int(np.isnan(reward).sum())
    if lacking > ppo.max_unscored * len(reward):
        causes = "; ".join(
            f"{name}: {s.timeouts} timeouts, {s.errors} errors, for example: {s.example}"
            for name, s in scores.items()
            if s.timeouts or s.errors
        )
        raise RewardError(
            f"{lacking} of {len(reward)} answers have no score (ppo.max_unscored: {ppo.max_unscored:g}). {causes}"
        )
    return reward


def evaluate(team: Team, prompts: int) -> Evaluation:
    """Answer every held-out prompt once with the engines' present weights; the same seeds every time, so answers pair up."""
    ppo = team.config.ppo
    assert ppo is not None and ppo.evaluation is not None
    rollouts = team.generate(DATA, np.arange(prompts), step=0).get()
    judges = [judge.name for judge in ppo.evaluation.judges]
    names = [source.name for source in ppo.rewards] + judges
    reference, scores = together(team.log_probs(rollouts), team.scores(rollouts, names))
    texts = team.texts(rollouts)
    return Evaluation(
        prompts=[prompt for prompt, _ in texts],
        answers=[answer for _, answer in texts],
        reward=weighted_sum(scores, ppo),
        judges={name: scores[name].values for name in judges},
        kl=reference.per_answer / rollouts.answer_lengths,
        tokens=rollouts.answer_lengths,
    )


def _or_null(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
