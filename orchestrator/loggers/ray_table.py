"""Table of the metrics for Prometheus: names, kinds and help texts, for each recorded metric.

Names follow Prometheus: base units, `_total` for counters. `python -m orchestrator.loggers.ray_table >
docs/ray_metrics.md` writes the table as a document.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Literal

Kind = Literal["gauge", "counter", "histogram"]


@dataclass(frozen=True)
class Row:
    """A recorded metric and its form for Prometheus."""

    kind: Kind
    metric: str
    """Name in metrics.jsonl. A part in braces matches any text, which becomes the label of that name."""
    name: str
    help: str
    scale: float = 1.0
    """Base units per recorded unit, for example bytes per GiB."""

    @cached_property
    def labels(self) -> tuple[str, ...]:
        return ("run", "stage", *re.findall(r"{(\w+)}", self.metric))

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        parts = re.split(r"{(\w+)}", self.metric)  # text, label, text, ...
        return re.compile("".join(f"(?P<{part}>.+)" if k % 2 else re.escape(part) for k, part in enumerate(parts)))


gauge, counter, histogram = (partial(Row, kind) for kind in ("gauge", "counter", "histogram"))

TABLE = (
    gauge("step", "troupe_step", "Finished steps of the stage."),
    counter(
        "samples",
        "troupe_samples_total",
        "Responses generated (PPO), or rows trained on (SFT, reward model). Repeated steps count again.",
    ),
    counter("tokens", "troupe_tokens_total", "Tokens of these responses or rows. Repeated steps count again."),
    gauge("tokens_per_second", "troupe_tokens_per_second", "Tokens of the latest step divided by its seconds."),
    histogram(
        "seconds/step",
        "troupe_step_seconds",
        "Seconds of a step, without evaluation, snapshot and checkpoint. The sum is estimated from the buckets.",
    ),
    histogram(
        "seconds/{phase}",
        "troupe_phase_seconds",
        "Seconds of a phase of a step. The sum is estimated from the buckets.",
    ),
    counter(
        "role_seconds/{role}/{method}",
        "troupe_role_seconds_total",
        "Seconds in which calls of a method to the workers of a role were running.",
    ),
    gauge(
        "memory_gib/{role}",
        "troupe_memory_bytes",
        "Proportional set size of a role's workers, or of the driver, after the latest step.",
        2**30,
    ),
    counter(
        "failures/{role}/{kind}",
        "troupe_failures_total",
        "Calls to workers that failed: the worker raised (error), died, hung, or its reply was lost.",
    ),
    counter("restarts/{role}", "troupe_restarts_total", "Worker processes of a role that replaced others."),
    counter(
        "skipped/{role}",
        "troupe_skipped_steps_total",
        "Optimizer steps that were not applied: loss, gradient or KL not finite or too large.",
    ),
    counter("updates", "troupe_actor_updates_total", "Optimizer steps of the actor that were applied."),
    counter(
        "early_stop",
        "troupe_early_stops_total",
        "Steps whose remaining mini-batches were dropped (ppo.target_kl).",
    ),
    counter("unscored", "troupe_unscored_samples_total", "Responses that were not trained on."),
    counter(
        "timeouts/{source}", "troupe_reward_timeouts_total", "Responses that a source of rewards did not score in time."
    ),
    counter(
        "errors/{source}",
        "troupe_reward_errors_total",
        "Responses that a source of rewards did not score for another reason.",
    ),
    counter("weight_sync_mib", "troupe_weight_sync_bytes_total", "Bytes of weights given to each engine.", 2**20),
    gauge(
        "policy_version",
        "troupe_policy_version",
        "Version of the policy that generated the responses of the latest step.",
    ),
    gauge(
        "reward/mean",
        "troupe_reward_mean",
        "Mean reward (weighted sum of the sources) of the responses of the latest step.",
    ),
    gauge("reward/std", "troupe_reward_std", "Standard deviation of the rewards of the latest step."),
    gauge(
        "reward/{source}_std", "troupe_reward_source_std", "Standard deviation of a source's scores in the latest step."
    ),
    gauge(
        "reward/{source}", "troupe_reward_source_mean", "Mean score by a source, before weights, in the latest step."
    ),
    gauge("kl", "troupe_kl_nats", "KL divergence of the policy from the reference, per token, in the latest step."),
    gauge("kl_coefficient", "troupe_kl_coefficient", "Weight of the KL penalty."),
    gauge(
        "approx_kl",
        "troupe_update_kl_nats",
        "KL divergence of the policy that sampled from the one that is updated, per token, mean over the updates.",
    ),
    gauge(
        "clip_fraction",
        "troupe_clipped_tokens_ratio",
        "Share of tokens whose gradient the clip of the policy loss took away.",
    ),
    gauge(
        "entropy",
        "troupe_entropy_nats",
        "Entropy of the policy, per token, in the first mini-batch of the latest step.",
    ),
    gauge(
        "logprob_mismatch",
        "troupe_logprob_mismatch_nats",
        "Mean difference of engine and trainer in the log-probability of a token, in the first mini-batch.",
    ),
    gauge(
        "probe_gap",
        "troupe_probe_gap_nats",
        "Mean difference of engine and trainer in the log-probability of a probe's token, after the latest update.",
    ),
    gauge("length/prompt", "troupe_prompt_tokens_mean", "Mean length of the prompts of the latest step."),
    gauge("length/response", "troupe_response_tokens_mean", "Mean length of the responses of the latest step."),
    gauge("truncated", "troupe_cut_off_answers_ratio", "Share of responses that were cut off at the token limit."),
    gauge("advantage/mean", "troupe_advantage_mean", "Mean advantage before whitening."),
    gauge("advantage/std", "troupe_advantage_std", "Standard deviation of the advantages before whitening."),
    gauge(
        "explained_variance",
        "troupe_explained_variance_ratio",
        "Share of the variance of the returns that the critic predicts.",
    ),
    gauge("loss", "troupe_loss", "Training loss of the latest step (SFT: nats per token; reward model: per pair)."),
    gauge("loss/policy", "troupe_policy_loss", "Policy loss of the latest step."),
    gauge("loss/value", "troupe_value_loss", "Value loss of the latest step."),
    gauge("loss/ptx", "troupe_pretraining_loss", "Loss on demonstrations beside the policy loss (ppo.ptx)."),
    gauge("perplexity", "troupe_perplexity", "exp of the training loss of the latest step."),
    gauge("accuracy", "troupe_accuracy_ratio", "Preference accuracy on the pairs of the latest step."),
    gauge("lr/{role}", "troupe_learning_rate", "Learning rate of the latest step."),
    gauge(
        "grad_norm/{role}", "troupe_gradient_norm", "Norm of the gradients before clipping, in the last optimizer step."
    ),
    gauge("validation/loss", "troupe_validation_loss", "Loss on held-out rows at the latest validation."),
    gauge("validation/perplexity", "troupe_validation_perplexity", "exp of the loss on held-out demonstrations."),
    gauge("validation/accuracy", "troupe_validation_accuracy_ratio", "Preference accuracy on held-out pairs."),
    gauge("evaluation/reward", "troupe_evaluation_reward_mean", "Mean reward of the responses to held-out prompts."),
    gauge("evaluation/reward_ci_low", "troupe_evaluation_reward_low", "Lower end of its 95% interval."),
    gauge("evaluation/reward_ci_high", "troupe_evaluation_reward_high", "Upper end of its 95% interval."),
    gauge(
        "evaluation/reward_std",
        "troupe_evaluation_reward_std",
        "Standard deviation of the rewards on held-out prompts.",
    ),
    gauge(
        "evaluation/kl", "troupe_evaluation_kl_nats", "KL divergence from the reference on held-out prompts, per token."
    ),
    gauge(
        "evaluation/length", "troupe_evaluation_answer_tokens_mean", "Mean length of the responses to held-out prompts."
    ),
    gauge(
        "evaluation/distinct",
        "troupe_evaluation_distinct_ratio",
        "Distinct responses to held-out prompts over all of them.",
    ),
    gauge("evaluation/{source}", "troupe_evaluation_judge_mean", "Mean score by a judge on held-out prompts."),
    gauge("{metric}", "troupe_metric", "A metric that has no name of its own here, as metrics.jsonl has it."),
)
"""A metric has the first row that matches its name."""


def row_of(metric: str, among: Mapping[str, float]) -> tuple[Row, dict[str, str]]:
    """The row of the table for a metric, and the labels in its name. among: the metrics recorded with it.

    >>> row, labels = row_of("reward/brief_std", {"reward/brief": 0.0, "reward/brief_std": 0.0})
    >>> row.name, labels
    ('troupe_reward_source_std', {'source': 'brief'})
    """
    for row in TABLE:
        match = row.pattern.fullmatch(metric)
        # A source may be named x_std: only with a metric x beside it is x_std a standard deviation.
        if match and not (
            row.metric.endswith("_std") and "{" in row.metric and metric.removesuffix("_std") not in among
        ):
            return row, match.groupdict()
    raise AssertionError("the last row matches every name")


def markdown() -> str:
    """docs/ray_metrics.md."""
    lines = [
        "# Metrics on Ray's metrics port",
        "",
        "Generated from orchestrator/loggers/ray_table.py by `python -m orchestrator.loggers.ray_table > docs/ray_metrics.md`.",
        "Names are as Ray shows them; every metric has the labels `run` and `stage` too.",
        "",
        "| Name | Kind | Labels | In metrics.jsonl | Meaning |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in TABLE:
        labels = ", ".join(f"`{label}`" for label in row.labels[2:])
        lines.append(f"| `ray_{row.name}` | {row.kind} | {labels} | `{row.metric}` | {row.help} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
