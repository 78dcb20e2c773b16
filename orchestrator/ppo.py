"""Stage 3: PPO with an actor and a critic. `step` is the algorithm."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import numpy as np

from configs.schema import ModelReward, Role
from orchestrator.calls import together
from orchestrator.checks import check_columns
from orchestrator.evaluation import DATA, evaluate, record_faults, weighted_sum
from orchestrator.kl_control import make_controller
from orchestrator.outcome import outcome
from orchestrator.rollouts import Experience, Rollouts
from orchestrator.run import RunError, local
from orchestrator.scores import shape_scores
from orchestrator.stage import StageRun
from workers.data import batches, epoch_order
from workers.scored import Scored


class LogProbGapError(RuntimeError):
    """The engines do not compute what the trainer computes."""


class PPO(StageRun):
    """Reinforcement learning against the reward, held near the reference by a KL penalty."""

    name = "ppo"

    @property
    def steps(self) -> int:
        return self.ppo.steps

    def trained(self) -> list[Role]:
        return ["actor", "critic"] if "critic" in self.plan.roles else ["actor"]

    # ------------------------------------------------------------ the algorithm

    def step(self, step: int) -> dict[str, float]:
        team, ppo = self.team, self.ppo
        started = time.monotonic()
        progress = (step - 1) / ppo.steps
        with self.phase("generate"):
            rollouts = team.generate("prompts", self._prompts(step), step, ppo.samples_per_prompt).get()
        with self.phase("score"):
            reference, values, scores = together(
                team.log_probs(rollouts), team.values(rollouts), team.scores(rollouts, self.sources)
            )
        self._record_faults(scores)
        reward = weighted_sum(scores, ppo)
        kl = float(reference.per_answer.sum() / rollouts.answer_lengths.sum())
        sane = kl <= ppo.refuse_kl  # nan is not
        learns = step > ppo.critic_warmup and sane
        kept = self._whole(np.flatnonzero(~np.isnan(reward)))
        shaped = np.full(len(reward), np.nan, np.float32)
        shaped[kept] = shape_scores(reward[kept], rollouts.ended[kept], ppo)
        experience = Experience(
            rollouts, reference, values, shaped, self.kl.coefficient, self._demonstrations(step), kept
        )
        with self.phase("train"):
            actor, critic = together(
                team.train_actor(experience, progress, step, update=learns),
                team.train_critic(experience, progress, step) if sane else None,
            )
        if not actor["refused/actor"]:
            self._check_gap(step, actor["log_prob_gap"])
        actor["refused/actor"] += not sane
        if actor["updates"]:
            with self.phase("publish"):
                self.version += 1
                actor["published_mib"] = team.publish(self.version) / 2**20
        metrics = self._measure(rollouts, kl, scores, reward) | {"left_out": float(len(reward) - len(kept))}
        metrics |= actor | (critic or {})
        if not sane and "critic" in team.groups:
            metrics["refused/critic"] = 1.0
        metrics["seconds/step"] = time.monotonic() - started
        metrics["tokens_per_second"] = float(rollouts.answer_lengths.sum()) / metrics["seconds/step"]
        if actor["updates"]:
            self.kl.update(kl, len(rollouts))
        return metrics | self._evaluation(step)

    def _prompts(self, step: int) -> np.ndarray:
        """Rows of the step's prompts: epoch after epoch, each in its own order. A function of the step: nothing to save."""
        first, count, n = (step - 1) * self.ppo.prompts_per_step, self.ppo.prompts_per_step, len(self.prompts)
        epochs = range(first // n, (first + count - 1) // n + 1)
        stream = np.concatenate([epoch_order(n, self.config.seed, epoch) for epoch in epochs])
        return stream[first - epochs[0] * n :][:count]

    def _demonstrations(self, step: int) -> list[np.ndarray]:
        """Rows of demonstrations beside each mini-batch (PPO-ptx); likewise a function of the step."""
        if self.ppo.ptx is None:
            return []
        first = (step - 1) * self.ppo.mini_batches
        return [self.ptx_batches[k % len(self.ptx_batches)] for k in range(first, first + self.ppo.mini_batches)]

    def _whole(self, samples: np.ndarray) -> np.ndarray:
        """As many of the samples as divide among the mini-batches and the ranks."""
        ranks = [len(self.team.groups[role]) for role in self.trained()]
        return samples[: len(samples) // (unit := self.ppo.mini_batches * math.lcm(*ranks)) * unit]

    def _check_gap(self, step: int, gap: float) -> None:
        if not gap <= self.ppo.max_log_prob_gap:
            raise LogProbGapError(
                f"step {step}: engine and trainer differ by {gap:.4f} nats per token in their log-probabilities on the same "
                f"tokens (ppo.max_log_prob_gap: {self.ppo.max_log_prob_gap}). The engine does not serve the actor's weights, or "
                f"computes in another precision (model.dtype {self.config.model.dtype})."
            )

    def _measure(
        self, rollouts: Rollouts, kl: float, scores: dict[str, Scored], reward: np.ndarray
    ) -> dict[str, float]:
        return {
            **reward_metrics(reward, scores),
            **{f"timeouts/{name}": float(scored.timeouts) for name, scored in scores.items()},
            **{f"errors/{name}": float(scored.errors) for name, scored in scores.items()},
            "kl": kl,
            "kl_coefficient": self.kl.coefficient,
            "length/prompt": float(rollouts.prompt_lengths.mean()),
            "length/answer": float(rollouts.answer_lengths.mean()),
            "missing_eos": float(1 - rollouts.ended.mean()),
            "policy_version": float(max(rollouts.versions)),
            **self.spent(),
        }

    # ------------------------------------------------------------ before and after

    def read(self) -> None:
        assert self.config.ppo is not None
        self.ppo = self.config.ppo
        self.prompts = self.rows(self.ppo.prompts, "prompt")
        held_out = self.ppo.evaluation
        self.evaluation_prompts = self.rows(held_out.prompts, "prompt") if held_out else []
        check_columns(self.ppo, self.prompts, self.evaluation_prompts)
        self.ptx_rows = []
        if self.ppo.ptx:
            data = self.ppo.ptx.data or (self.config.sft.train if self.config.sft else None)
            if data is None:
                raise RunError("ppo.ptx.data: none is named and there is no sft stage to take demonstrations from")
            self.ptx_rows = self.rows(data, "demonstration")
        self.sources = [source.name for source in self.ppo.rewards]
        self.reward_models = {
            s.name: local(s.path) if s.path else str(self.run.model("rm"))
            for s in self.ppo.rewards
            if isinstance(s, ModelReward)
        }
        self.kl = make_controller(self.ppo.kl.control)
        self.version = 0

    def load(self) -> None:
        """Load models and data; answer the held-out prompts before anything is learnt."""
        team, ppo = self.team, self.ppo
        team.load(self.run.starting_model("ppo"), self.reward_models)
        for name, rows in (("prompts", self.prompts), (DATA, self.evaluation_prompts)):
            if rows:
                team.add_prompts(name, rows)
        if self.ptx_rows:
            assert ppo.ptx is not None
            team.add_data("sft", self.ptx_rows, ["actor"])
            team.tokenize("actor", "sft", "demonstration", ppo.max_prompt_tokens + self.config.rollout.max_new_tokens)
            self.ptx_batches = batches(team.lengths["sft"][0], ppo.ptx.batch_size, 1.0, self.config.seed)

    def begin(self) -> None:
        if self.evaluation_prompts:
            self.progress.phase("answering the held-out prompts")
            self._evaluate("before")

    def set_state(self, state: dict[str, Any]) -> None:
        super().set_state(state)
        self.version = state["version"]
        self.kl.load(state["kl"])
        self.team.publish(self.version)

    def state(self) -> dict[str, Any]:
        return super().state() | {"version": self.version, "kl": self.kl.state()}

    def _evaluation(self, step: int) -> dict[str, float]:
        every = self.ppo.evaluation.every if self.ppo.evaluation else None
        if step == self.steps:
            return self._evaluate("after")
        return self._evaluate(f"step-{step}") if every and step % every == 0 else {}

    def _evaluate(self, when: str) -> dict[str, float]:
        """Metrics of an evaluation; none where one during or after the training failed, which goes on without it."""
        metrics: dict[str, float] = {}
        if not self.evaluation_prompts:
            return metrics
        with self.sparing(f"the evaluation {when} is left out") if when != "before" else nullcontext():
            with self.phase("evaluate"):
                found = evaluate(self.team, len(self.evaluation_prompts))
            self._record_faults(found.scores)
            found.write(self.run.folder / "evaluation" / f"{when}.jsonl")
            metrics = found.metrics() | {"seconds/evaluate": self.seconds.pop("evaluate")}
        if when == "before":
            self.recorder.record(0, metrics)
        return metrics

    def _record_faults(self, scores: dict[str, Scored]) -> None:
        for text in record_faults(self.run.failures, scores):
            self.warn(f"{text} ({self.run.failures.folder})")

    def result(self) -> dict[str, float]:
        return {"steps": float(self.steps), **outcome(self.run.folder)}


def reward_metrics(reward: np.ndarray, scores: Mapping[str, Scored]) -> dict[str, float]:
    """Mean and deviation of the reward and of each source over the answers [samples] that it has a number for (nan: it has
    none), and the means of the other numbers that sources measure; nothing of one that has no number at all."""
    columns = [("mean", "std", reward), *((name, f"{name}_std", scored.values) for name, scored in scores.items())]
    metrics: dict[str, float] = {}
    for mean, deviation, values in columns:
        known = values[~np.isnan(values)]
        if len(known):
            metrics |= {f"reward/{mean}": float(known.mean()), f"reward/{deviation}": float(known.std())}
    for name, scored in scores.items():
        metrics |= scored.means(f"reward/{name}")
    return metrics
