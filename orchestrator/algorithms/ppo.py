"""Stage 3: PPO with an actor and a critic. `step` is the algorithm."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from configs.schema import ModelReward, ModelSettings
from orchestrator.algorithms.base import Algorithm
from orchestrator.algorithms.credit import AnswerScores, answer_advantages
from orchestrator.algorithms.kl_controller import kl_term, make_controller
from orchestrator.algorithms.reward_shaping import shape_scored
from orchestrator.evaluation.before_after import before_after_numbers
from orchestrator.evaluation.evaluate import DATA, evaluate, record_faults, weighted_sum
from orchestrator.evaluation.sample_log import keep_samples
from orchestrator.preflight.model_checks import Head, ModelUse
from orchestrator.preflight.preflight import Input
from orchestrator.preflight.settings_checks import Check, column_checks
from orchestrator.run.run_dir import Run, local
from orchestrator.worker_groups.calls import run_concurrently
from orchestrator.worker_groups.rollouts import Experience, Rollouts, TokenColumn
from placement import stages
from workers.data import batches, encode_demonstrations, encode_prompts, epoch_order
from workers.rewards.result import RewardResult


class LogProbGapError(RuntimeError):
    """Engine and trainer compute different log-probabilities."""


@dataclass(frozen=True)
class ScoredRollouts:
    """A step's rollouts with the reference's log-probabilities, the critic's values and the scores of the reward sources."""

    rollouts: Rollouts
    reference: TokenColumn | None
    values: TokenColumn | None
    results: dict[str, RewardResult]
    """By reward source."""
    rewards: np.ndarray
    """[samples] weighted sums of the sources' scores; nan: no score."""
    kl: float | None
    """Mean KL to the reference, nats per token; None: there is no reference."""

    def within_kl_limit(self, limit: float) -> bool:
        """Whether the KL is at most `limit`; False for nan."""
        return self.kl is None or self.kl <= limit


class PPO(Algorithm):
    """Reinforcement learning on the reward; a KL penalty keeps the policy near the reference."""

    spec = stages.PPO
    learns_from = "prompts"

    @property
    def steps(self) -> int:
        return self.ppo.steps

    # ------------------------------------------------------------ the algorithm

    def step(self, step: int) -> dict[str, float]:
        started = time.monotonic()
        with self.context.phase("generate"):
            rollouts = self.team.generate("prompts", self._prompts(step), step, self.ppo.samples_per_prompt).get()
        with self.context.phase("score"):
            scored = self._score(rollouts)
        experience = self._assign_credit(step, scored)
        with self.context.phase("train"):
            update = self._train(step, experience, scored.within_kl_limit(self.ppo.max_kl_per_step))
        if update["updates"]:
            update |= self._sync_weights()
        metrics = self._measure(scored) | update
        keep_samples(
            self.context.keep_answers, self.team, step, rollouts, scored.reference, scored.results, scored.rewards
        )
        metrics["seconds/step"] = time.monotonic() - started
        metrics["tokens_per_second"] = metrics["tokens"] / metrics["seconds/step"]
        if update["updates"] and scored.kl is not None:
            self.kl.update(scored.kl, len(rollouts))
        return metrics | self._evaluation(step)

    def _score(self, rollouts: Rollouts) -> ScoredRollouts:
        """Reference, critic and rewards at the same time."""
        team = self.team
        reference, values, results = run_concurrently(
            team.log_probs(rollouts), team.values(rollouts), team.scores(rollouts, self.sources)
        )
        self._record_faults(results)
        kl = None if reference is None else float(reference.per_answer.sum() / rollouts.trained_tokens.sum())
        return ScoredRollouts(rollouts, reference, values, results, weighted_sum(results, self.ppo), kl)

    def _assign_credit(self, step: int, scored: ScoredRollouts) -> Experience:
        """Shape the rewards, and compute the advantages if they are per response."""
        rollouts = scored.rollouts
        shaped = shape_scored(scored.rewards, rollouts.ended, self.ppo)
        by_source = {name: result.values for name, result in scored.results.items()}
        scores = AnswerScores(shaped.astype(np.float64), rollouts.groups, rollouts.trained_tokens, by_source)
        return Experience(
            rollouts,
            scored.reference,
            scored.values,
            shaped,
            kl_term(self.ppo.kl, self.kl.coefficient),
            answer_advantages(self.ppo, scores),
            self._demonstrations(step),
        )

    def _train(self, step: int, experience: Experience, within_kl_limit: bool) -> dict[str, float]:
        """Metrics of the updates of actor and critic. If no response has a score, there are no updates, and a warning.

        Beyond the KL limit neither is trained; the actor only measures the mismatch with the engines.
        """
        metrics = {"updates": 0.0, "skipped/actor": 0.0}
        if len(experience.scored):
            update_policy = within_kl_limit and step > self.ppo.warmup_steps
            actor, critic = run_concurrently(
                self.team.train_actor(experience, step, self.steps, update_policy),
                self.team.train_critic(experience, step, self.steps) if within_kl_limit else None,
            )
            if not actor["skipped/actor"]:
                self._check_gap(step, actor["logprob_mismatch"])
            metrics = actor | (critic or {})
        else:
            self.context.warn(
                f"step {step}: none of its {len(experience.rollouts)} responses has a score; the step trains nothing"
            )
        return metrics if within_kl_limit else metrics | self._skipped_by_kl(metrics)

    def _skipped_by_kl(self, metrics: dict[str, float]) -> dict[str, float]:
        """Counts of skipped updates by trained role, with one more each for the step beyond `ppo.max_kl_per_step`."""
        counts = {f"skipped/{role}": metrics.get(f"skipped/{role}", 0.0) for role in self.trained()}
        return {name: count + 1.0 for name, count in counts.items()}

    def _sync_weights(self) -> dict[str, float]:
        """Send the actor's new weights to the engines, under the next version."""
        with self.context.phase("weight_sync"):
            self.version += 1
            published = self.team.sync_weights(self.version)
        self.context.seconds["prove"] = published.proof_seconds
        self.context.seconds["weight_sync"] -= published.proof_seconds
        return {"weight_sync_mib": published.nbytes / 2**20, "probe_gap": published.gap}

    def _prompts(self, step: int) -> np.ndarray:
        """Rows of the step's prompts: each epoch in its own order. A function of the step, so not part of `state`."""
        first, count, n = (step - 1) * self.ppo.prompts_per_step, self.ppo.prompts_per_step, self.counts["prompts"].kept
        epochs = range(first // n, (first + count - 1) // n + 1)
        stream = np.concatenate([epoch_order(n, self.config.seed, epoch) for epoch in epochs])
        return stream[first - epochs[0] * n :][:count]

    def _demonstrations(self, step: int) -> list[np.ndarray]:
        """Rows of the demonstrations for each mini-batch (PPO-ptx); a function of the step too."""
        if self.ppo.ptx is None:
            return []
        first = (step - 1) * self.ppo.mini_batches
        return [self.ptx_batches[k % len(self.ptx_batches)] for k in range(first, first + self.ppo.mini_batches)]

    def _check_gap(self, step: int, gap: float) -> None:
        bound = self.ppo.max_logprob_mismatch or self.config.gap_bound(self.config.model)
        if not gap <= bound:
            raise LogProbGapError(
                f"step {step}: engine and trainer differ by {gap:.4f} nats per token in their log-probabilities on the same "
                f"tokens (ppo.max_logprob_mismatch: {bound:g}). The engine does not use the actor's weights, or "
                f"computes in another precision (model.dtype {self.config.model.dtype})."
            )

    def _measure(self, scored: ScoredRollouts) -> dict[str, float]:
        rollouts, results = scored.rollouts, scored.results
        return {
            **reward_metrics(scored.rewards, results),
            "unscored": float(np.isnan(scored.rewards).sum()),
            **{f"timeouts/{name}": float(result.timeouts) for name, result in results.items()},
            **{f"errors/{name}": float(result.errors) for name, result in results.items()},
            **({} if scored.kl is None else {"kl": scored.kl, "kl_coefficient": self.kl.coefficient}),
            "length/prompt": float(rollouts.prompt_lengths.mean()),
            "length/response": float(rollouts.answer_lengths.mean()),
            "truncated": float(1 - rollouts.ended.mean()),
            "policy_version": float(rollouts.max_versions.max()),
            "samples": float(len(rollouts)),
            "tokens": float(rollouts.trained_tokens.sum()),
            **self.context.spent(),
        }

    # ------------------------------------------------------------ setup, evaluation and result

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        assert self.config.ppo is not None
        self.ppo = self.config.ppo
        self.sources = [source.name for source in self.ppo.rewards]
        self.kl = make_controller(self.ppo.kl.controller)
        self.version = 0

    def inputs(self) -> list[Input]:
        ppo, sft = self.ppo, self.config.sft
        prompts = partial(encode_prompts, max_tokens=ppo.max_prompt_tokens, overlong=ppo.overlong)
        inputs = [Input("prompts", "ppo.prompts", ppo.prompts, "prompt", prompts)]
        if ppo.evaluation:
            inputs.append(Input(DATA, "ppo.evaluation.prompts", ppo.evaluation.prompts, "prompt", prompts))
        if ppo.ptx:
            data = ppo.ptx.data or (sft.train if sft else None)
            assert data is not None  # RunConfig refuses it
            longest = ppo.max_prompt_tokens + self.config.rollout.max_new_tokens
            encode = partial(
                encode_demonstrations, max_length=longest, overlong="cut", turns=sft.turns if sft else "all"
            )
            inputs.append(Input("sft", "ppo.ptx.data", data, "demonstration", encode))
        return inputs

    def models(self) -> list[ModelUse]:
        longest = self.ppo.max_prompt_tokens + self.config.rollout.max_new_tokens
        longest_settings = "ppo.max_prompt_tokens + rollout.max_new_tokens"
        rewards = self.readers()
        heads: list[Head] = ["language"]
        if self.ppo.critic and all(use.reads_text for use in rewards):
            heads.append("scalar")  # the critic starts from it
        policy = self.start_use(heads, served=True, longest=longest, longest_settings=longest_settings)
        existing = [use for use in rewards if use.heads]
        return [
            policy,
            *(
                use if use.reads_text else replace(use, longest=longest, longest_settings=longest_settings)
                for use in existing
            ),
        ]

    def readers(self) -> list[ModelUse]:
        """The reward models. For one that this run will train: its starting model, with no head needed yet."""
        uses = []
        paths = self.run.reward_models()
        for i, source in enumerate(self.ppo.rewards):
            if not isinstance(source, ModelReward):
                continue
            path, heads = paths.get(source.name), frozenset[Head](["scalar"])
            if path is None or not (source.path or Path(path).is_dir()):
                own = self.config.rm.model if self.config.rm else None
                path, heads = local(own.path) if own else self.run.text_model("rm"), frozenset()
            own_tokenizer, policy = source.tokenizer == "own", self.config.model
            settings = ModelSettings(
                path=path,
                dtype=policy.dtype,
                end_tokens=None if own_tokenizer else policy.end_tokens,
                trust_remote_code=policy.trust_remote_code,
            )
            uses.append(ModelUse(f"ppo.rewards.{i}.path", path, settings, heads, reads_text=own_tokenizer))
        return uses

    def data_checks(self) -> Iterable[Check]:
        held_out = self.data[DATA].rows if DATA in self.data else []
        return column_checks(self.ppo, self.data["prompts"].rows, held_out)

    def load(self) -> None:
        """Load models and data."""
        team, ppo = self.team, self.ppo
        team.load(self.run.starting_model("ppo"), self.run.reward_models())
        for name in ("prompts", DATA):
            if name in self.data:
                team.add_encoded_prompts(name, self.data[name])
        if ppo.ptx:
            team.add_data("sft", self.data["sft"], "actor")
            self.ptx_batches = batches(team.lengths["sft"][0], ppo.ptx.batch_size, 1.0, self.config.seed)

    def begin(self) -> None:
        if DATA in self.data:
            self.context.show("evaluating held-out prompts")
            self._evaluate("before")

    def set_state(self, state: Mapping[str, Any]) -> None:
        self.version = state["version"]
        self.kl.load(state["kl"])
        self.team.sync_weights(self.version)

    def state(self) -> dict[str, Any]:
        return {"version": self.version, "kl": self.kl.state()}

    def _evaluation(self, step: int) -> dict[str, float]:
        every = self.ppo.evaluation.every if self.ppo.evaluation else None
        if step == self.steps:
            return self._evaluate("after")
        return self._evaluate(f"step-{step}") if every and step % every == 0 else {}

    def _evaluate(self, when: str) -> dict[str, float]:
        """Metrics of an evaluation. None if it failed during or after the training: the stage goes on without it."""
        metrics: dict[str, float] = {}
        if DATA not in self.data:
            return metrics
        with self.context.sparing(f"the evaluation {when} is omitted") if when != "before" else nullcontext():
            with self.context.phase("evaluate"):
                evaluation = evaluate(self.team, self.counts[DATA].kept)
            self._record_faults(evaluation.scores)
            evaluation.write(self.run.folder / "evaluation" / f"{when}.jsonl")
            metrics = evaluation.metrics() | {"seconds/evaluate": self.context.seconds.pop("evaluate")}
        if when == "before":
            self.context.record(0, metrics)
        return metrics

    def _record_faults(self, scores: dict[str, RewardResult]) -> None:
        for text in record_faults(self.run.failures, scores):
            self.context.warn(f"{text} ({self.run.failures.folder})")

    def result(self) -> dict[str, float]:
        return {"steps": float(self.steps), **before_after_numbers(self.run.folder)}


def reward_metrics(reward: np.ndarray, scores: Mapping[str, RewardResult]) -> dict[str, float]:
    """Mean and standard deviation of the reward and of each source's scores [samples] without nan, and the means of the other
    numbers that sources return. A source without any score has no metrics."""
    columns = [("mean", "std", reward), *((name, f"{name}_std", scored.values) for name, scored in scores.items())]
    metrics: dict[str, float] = {}
    for mean, deviation, values in columns:
        finite = values[~np.isnan(values)]
        if len(finite):
            metrics |= {f"reward/{mean}": float(finite.mean()), f"reward/{deviation}": float(finite.std())}
    for name, scored in scores.items():
        metrics |= scored.means(f"reward/{name}")
    return metrics
