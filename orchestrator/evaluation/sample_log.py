"""The log of training answers for readers: a few answers of some steps, in samples/ppo.jsonl of a run's folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator.storage import SAMPLES, read_lines
from orchestrator.worker_groups.rollouts import Rollouts, TokenColumn, kl_per_token
from orchestrator.worker_groups.team import Team
from workers.rewards.result import RewardResult


def keep_samples(
    keep: Callable[[int, Sequence[Mapping[str, Any]], int], None],
    team: Team,
    step: int,
    rollouts: Rollouts,
    reference: TokenColumn | None,
    scores: Mapping[str, RewardResult],
    reward: np.ndarray,
) -> None:
    """Log some of a step's answers if `ppo.answer_log` includes the step; the seed and the step determine the choice.

    keep: writes a step's answers to a file of at most so many bytes. reward: [samples] the weighted sum of the scores; nan: no
    score.
    """
    config = team.config
    assert config.ppo is not None
    log = config.ppo.answer_log
    if log is None or (step % log.every and step not in (1, config.ppo.steps)):
        return
    drawn = np.sort(np.random.default_rng((config.seed, step)).permutation(len(rollouts))[: log.answers])
    answers = _lines(drawn, team.texts(rollouts, drawn), rollouts, reference, scores, reward)
    keep(step, answers, log.most_mib * 2**20)


def _lines(
    drawn: np.ndarray,
    texts: Sequence[tuple[str, str]],
    rollouts: Rollouts,
    reference: TokenColumn | None,
    scores: Mapping[str, RewardResult],
    reward: np.ndarray,
) -> list[dict[str, Any]]:
    """A dict for each of the drawn samples.

    `row`: index in the prompts' dataset, from 0. `reward`: the weighted sum of `rewards`, the sources' scores; None: no score.
    `kl`: to the reference, nats per token; None: there is none.
    `tokens`: length of the answer. `ended`: whether it ended before the token limit.
    """
    kl = kl_per_token(rollouts, reference)
    return [
        {
            "row": int(rollouts.prompts[i]),
            "prompt": prompt,
            "answer": answer,
            "reward": _number(reward[i]),
            "rewards": {name: _number(scored.values[i]) for name, scored in scores.items()},
            "kl": _number(kl[i]),
            "tokens": int(rollouts.trained_tokens[i]),
            "ended": bool(rollouts.ended[i]),
        }
        for i, (prompt, answer) in zip(drawn, texts, strict=True)
    ]


def last_samples(folder: Path, stage: str) -> list[dict[str, Any]]:
    """The logged answers of the last step that has some; empty if there are none.

    Raises MetricsError if a line cannot be read.
    """
    path = folder / SAMPLES / f"{stage}.jsonl"
    steps = (
        [list(lines) for _, lines in groupby(read_lines(path), key=lambda line: line["step"])] if path.exists() else []
    )
    return steps[-1] if steps else []


def _number(value: float) -> float | None:
    """JSON has no NaN and no infinity."""
    return float(value) if np.isfinite(value) else None
