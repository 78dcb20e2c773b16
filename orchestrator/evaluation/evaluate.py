"""Evaluation: answers to held-out prompts with their rewards, judges' scores, and KL to the reference."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from configs.schema import PPOSettings
from orchestrator.evaluation.statistics import distinct_share, mean_interval
from orchestrator.storage import FailureLog, write_text, writing
from orchestrator.worker_groups.calls import run_concurrently
from orchestrator.worker_groups.rollouts import kl_per_token
from orchestrator.worker_groups.team import Team
from workers.rewards.function import RewardError
from workers.rewards.result import RewardResult

DATA = "evaluation"


@dataclass(frozen=True)
class Evaluation:
    """One answer to each held-out prompt; arrays are [prompts]."""

    prompts: list[str]
    answers: list[str]
    reward: np.ndarray
    """nan: without a score from each source."""
    scores: dict[str, RewardResult]
    """Reward source or judge -> its scores."""
    judges: list[str]
    """The names in `scores` that are judges."""
    kl: np.ndarray
    """Nats per token of each answer; nan: there is no reference."""
    tokens: np.ndarray

    def metrics(self) -> dict[str, float]:
        """Metrics; those of scores are omitted if no answer has a score."""
        metrics = {
            "evaluation/length": float(self.tokens.mean()),
            "evaluation/distinct": distinct_share(self.answers),
            "evaluation/unscored": float(np.isnan(self.reward).sum()),
        }
        kl = float((self.kl * self.tokens).sum() / self.tokens.sum())
        if not np.isnan(kl):
            metrics["evaluation/kl"] = kl
        scored = self.reward[~np.isnan(self.reward)]
        if len(scored):
            interval = mean_interval(scored.tolist())
            metrics |= {
                "evaluation/reward": interval.mean,
                "evaluation/reward_ci_low": interval.low,
                "evaluation/reward_ci_high": interval.high,
                "evaluation/reward_std": float(scored.std(ddof=1)) if len(scored) > 1 else 0.0,
            }
        for name, scores in self.scores.items():
            means = scores.means(f"evaluation/{name}")
            if name not in self.judges:
                means.pop(f"evaluation/{name}", None)  # a reward source's scores are part of the reward
            metrics |= means
        return metrics

    def write(self, path: Path) -> None:
        """Write a JSON line for each prompt. Raises DiskError."""
        rows = [
            {
                "prompt": prompt,
                "answer": answer,
                "reward": _or_null(self.reward[i]),
                "judges": {name: _or_null(self.scores[name].values[i]) for name in self.judges},
                "kl": _or_null(self.kl[i]),
                "tokens": int(self.tokens[i]),
            }
            for i, (prompt, answer) in enumerate(zip(self.prompts, self.answers, strict=True))
        ]
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def combined(scores: Mapping[str, RewardResult], ppo: PPOSettings) -> np.ndarray:
    """[samples] float64 rewards: the weighted sum over the sources; nan if a source with a weight gave no score, or if the sum is
    not a finite float32."""
    weighted = [(source.weight, scores[source.name].values) for source in ppo.rewards if source.weight]
    samples = len(scores[ppo.rewards[0].name].values)
    # In float64: 1e38 times a weight may exceed float32, and another source may bring the sum back into range.
    reward = np.zeros(samples) + sum(weight * values.astype(np.float64) for weight, values in weighted)
    reward[~(np.abs(reward) <= np.finfo(np.float32).max)] = np.nan
    return reward


def weighted_sum(scores: Mapping[str, RewardResult], ppo: PPOSettings) -> np.ndarray:
    """`combined`, for training. Raises RewardError if more than `ppo.max_unscored` of the samples have no score."""
    reward = combined(scores, ppo)
    unscored = int(np.isnan(reward).sum())
    if unscored > ppo.max_unscored * len(reward):
        weighted = [source.name for source in ppo.rewards if source.weight]
        causes = [
            f"{name}: {s.timeouts} timeouts, {s.errors} errors, for example: {s.example}"
            for name, s in scores.items()
            if name in weighted and (s.timeouts or s.errors)
        ] or ["the weighted sum exceeds float32 (ppo.rewards, weight)"]
        raise RewardError(
            f"{unscored} of {len(reward)} responses have no score (ppo.max_unscored: {ppo.max_unscored:g}). {'; '.join(causes)}"
        )
    return reward


def record_faults(log: FailureLog, scores: Mapping[str, RewardResult]) -> list[str]:
    """Record why answers have no score. Returns a line for each new reason."""
    new = []
    for name, scored in scores.items():
        for fault in scored.faults:
            text = f"{name} gave no score for {len(fault.samples)} of {len(scored.values)} responses: {fault.why}"
            if log.write_of_source(name, f"score: {text}\n{fault.detail}", fault.why):
                new.append(text)
    return new


def evaluate(team: Team, prompts: int) -> Evaluation:
    """Answer every held-out prompt once with the engines' current weights, with the same seeds in each evaluation.

    Answers without a score are not an error: nothing is trained on them.
    """
    ppo = team.config.ppo
    assert ppo is not None and ppo.evaluation is not None
    rollouts = team.generate(DATA, np.arange(prompts), step=0).get()
    judges = [judge.name for judge in ppo.evaluation.judges]
    names = [source.name for source in ppo.rewards] + judges
    reference, scores = run_concurrently(team.log_probs(rollouts), team.scores(rollouts, names))
    texts = team.texts(rollouts)
    return Evaluation(
        prompts=[prompt for prompt, _ in texts],
        answers=[answer for _, answer in texts],
        reward=combined(scores, ppo),
        scores=scores,
        judges=judges,
        kl=kl_per_token(rollouts, reference),
        tokens=rollouts.trained_tokens,
    )


def _or_null(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
