"""The report's sections on training: the final numbers and the curves of each stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

from configs.schema import ROLES, AdaptiveKL, PPOSettings, RunConfig
from orchestrator.number_text import percent, signed
from orchestrator.report.charts import AFTER, SERIES, Chart, Series, curves, moving_window, stacked, steps_per_column
from orchestrator.report.run_files import Line, RunFiles
from placement.stages import STAGES

PHASES = ("generate", "score", "train", "weight_sync", "prove")
"""Phases of a PPO step. `seconds/step` also includes the time between them."""
OVERHEAD = ("evaluate", "snapshot", "save")
"""Phases that `seconds/step` does not include."""

Format = Callable[[float], str]


@dataclass(frozen=True)
class Section:
    """The section of a stage."""

    key: str
    title: str
    summary: str
    charts: Sequence[Chart]


def sections(run: RunFiles) -> list[Section]:
    """Sections of the stages that recorded metrics."""
    made = [_OWN.get(stage, partial(_other, stage=stage))(run) for stage in STAGES]
    return [section for section in made if section is not None]


def title(stage: str) -> str:
    """A stage's title; its name if its plugin is not imported."""
    return STAGES[stage].title if stage in STAGES else stage


def _section(
    run: RunFiles, key: str, final: Mapping[str, Format], charts: Sequence[Chart | None], notes: Sequence[str] = ()
) -> Section | None:
    """None if the stage recorded no metrics. final: metric -> format; their last values are printed below the title, with their
    steps. notes: further text there."""
    existing = [chart for chart in charts if chart is not None]
    if not existing:
        return None
    last = {metric: point for metric in final if (point := run.last(key, metric))}
    numbers = [f"{final[metric](value)} (step {step:,})" for metric, (step, value) in last.items()]
    smoothed = ". Thin lines: single steps; bold lines: moving mean." if moving_window(run.steps(key)) > 1 else ""
    return Section(key, title(key), " · ".join([f"{run.steps(key):,} steps", *numbers, *notes]) + smoothed, existing)


def _lines(run: RunFiles, stage: str, metrics: Mapping[str, str], points: frozenset[str] = frozenset()) -> list[Series]:
    """A series for each of the metrics (name -> label) that the stage recorded."""
    series = []
    for color, (metric, label) in zip(SERIES * len(metrics), metrics.items(), strict=False):
        steps, values = run.curve(stage, metric)
        if values:
            series.append(Series(label, steps, values, color, points=metric in points))
    return series


def _chart(
    run: RunFiles, stage: str, title: str, caption: str, metrics: Mapping[str, str], **options: Any
) -> Chart | None:
    """Curves of the recorded metrics (name -> label); validation/ and evaluation/ metrics as points."""
    points = frozenset(metric for metric in metrics if metric.startswith(("validation/", "evaluation/")))
    series = _lines(run, stage, metrics, points)
    return curves(title, caption, series, **options) if series else None


def _sft(run: RunFiles) -> Section | None:
    loss = {"loss": "training", "validation/loss": "validation"}
    speed = {"tokens_per_second": "tokens/s"}
    return _section(
        run,
        "sft",
        {
            "validation/loss": lambda value: f"validation loss {value:.3f}",
            "validation/perplexity": lambda value: f"perplexity {value:,.1f}",
        },
        [
            _chart(run, "sft", "Loss", "Nats per completion token.", loss),
            _chart(run, "sft", "Gradient norm", "Before clipping.", {"grad_norm": "model"}),
            _chart(run, "sft", "Tokens per second", "Prompt and completion tokens, all ranks.", speed),
        ],
        _skipped(run, "sft", {"skipped": "model"}),
    )


def _rm(run: RunFiles) -> Section | None:
    accuracy = {"accuracy": "training", "validation/accuracy": "held out"}
    loss = {"loss": "training", "validation/loss": "held out"}
    return _section(
        run,
        "rm",
        {"validation/accuracy": lambda value: f"held-out preference accuracy {percent(value)}"},
        [
            _chart(run, "rm", "Preference accuracy", "Share of pairs; chance: 50%.", accuracy, percent=True, wide=True),
            _chart(run, "rm", "Pairwise loss", "Bradley-Terry, nats; chance: 0.693.", loss),
        ],
        _skipped(run, "rm", {"skipped": "model"}),
    )


def _other(run: RunFiles, stage: str) -> Section | None:
    """A stage from a plugin: a chart of each metric, training beside validation."""
    recorded = sorted({name for line in run.lines(stage) for name in line if not name.startswith(_TECHNICAL)})
    validation = "validation/"
    names = dict.fromkeys(name.removeprefix(validation) for name in recorded)
    charts = [_chart(run, stage, name, "", {name: "training", f"{validation}{name}": "held out"}) for name in names]
    last = {name: partial("{} {:.4g}".format, name) for name in recorded if name.startswith(validation)}
    return _section(run, stage, last, charts, _skipped(run, stage, {"skipped": "model"}))


_TECHNICAL = ("stage", "step", "time", "skipped", "seconds/", "memory_gib/", "samples", "tokens")


def _skipped(run: RunFiles, stage: str, metrics: Mapping[str, str]) -> list[str]:
    """Counts of skipped optimizer steps. metrics: metric -> trained role."""
    counts = {role: run.total(stage, metric) for metric, role in metrics.items()}
    return [f"{count:,.0f} skipped optimizer steps of the {role}" for role, count in counts.items() if count]


# ---------------------------------------------------------------- PPO


def _ppo(run: RunFiles) -> Section | None:
    if run.config.ppo is None:
        return None

    def show(title: str, caption: str, metrics: Mapping[str, str], **options: Any) -> Chart | None:
        return _chart(run, "ppo", title, caption, metrics, **options)

    notes = _skipped(run, "ppo", {"skipped/actor": "actor", "skipped/critic": "critic"})
    if excluded := run.total("ppo", "unscored"):
        notes.append(f"{excluded:,.0f} responses excluded from training")
    memory = {f"memory_gib/{owner}": owner for owner in (*ROLES, "driver")}
    return _section(
        run,
        "ppo",
        {
            "reward/mean": lambda value: f"reward {signed(value, 3)}",
            "kl": lambda value: f"KL {value:z.3f}",
        },
        [
            _reward(run),
            *_policy_charts(run.config, run.config.ppo, show),
            _seconds(run),
            show("Tokens per second", "Response tokens of a step / its seconds.", {"tokens_per_second": "tokens/s"}),
            show("Memory by role", "GiB of all workers of a role, and of the driver.", memory, wide=True),
        ],
        notes,
    )


def _policy_charts(config: RunConfig, settings: PPOSettings, show: Callable[..., Chart | None]) -> list[Chart | None]:
    control = settings.kl.controller
    target = (control.target, "target") if isinstance(control, AdaptiveKL) else None
    by_source = {f"reward/{source.name}": source.name for source in settings.rewards}
    bound = (settings.max_logprob_mismatch or config.gap_bound(config.model), "bound")
    kl = {"kl": "training", "evaluation/kl": "held out"}
    norms = {"grad_norm/actor": "actor", "grad_norm/critic": "critic"}
    explained = "Share of the returns' variance that the critic predicts; 1: perfect."
    first = "in a step's first mini-batch"
    return [
        show("KL to the reference", "Nats per token.", kl, line=target),
        show("KL coefficient", "Weight of the penalty.", {"kl_coefficient": "coefficient"}) if target else None,
        show("Reward by source", "Mean per step, before weights.", by_source) if len(by_source) > 1 else None,
        show("Entropy", f"Of the policy, nats per token, {first}.", {"entropy": "entropy"}),
        show("Length", "Tokens, mean per step.", {"length/response": "response", "length/prompt": "prompt"}),
        show("Truncated responses", "Share that hit the token limit.", {"truncated": "truncated"}, percent=True),
        show("Explained variance", explained, {"explained_variance": "critic"}),
        show("Value loss", "Of the critic.", {"loss/value": "critic"}),
        show("Clip fraction", "Share of tokens whose ratio is clipped.", {"clip_fraction": "tokens"}, percent=True),
        show("Gradient norms", "Of a step's last mini-batch, before clipping.", norms),
        show(
            "Log-prob gap", f"Engine vs trainer, mean |Δ| {first}.", {"logprob_mismatch": "gap"}, line=bound, log=True
        ),
    ]


def _reward(run: RunFiles) -> Chart | None:
    lines = [line for line in run.metrics if line["stage"] == "ppo"]
    scored = [line for line in lines if None not in (line.get("reward/mean"), line.get("reward/std"))]
    if not scored:
        return None
    steps, means = [line["step"] for line in scored], [line["reward/mean"] for line in scored]
    low = [line["reward/mean"] - line["reward/std"] for line in scored]
    high = [line["reward/mean"] + line["reward/std"] for line in scored]
    series = [Series("training", steps, means, AFTER, low, high)]
    ends = "evaluation/reward", "evaluation/reward_ci_low", "evaluation/reward_ci_high"
    if held_out := [line for line in lines if all(line.get(name) is not None for name in ends)]:
        values, low, high = ([line[name] for line in held_out] for name in ends)
        steps = [line["step"] for line in held_out]
        series.append(Series("held out, 95% interval", steps, values, SERIES[1], low, high, points=True))
    return curves("Reward", "Band: one standard deviation over the responses of a step.", series, wide=True)


def _seconds(run: RunFiles) -> Chart | None:
    """Seconds of PPO's steps by phase. `other`: the part of `seconds/step` that belongs to no phase."""
    lines = [line for line in run.lines("ppo") if line.get("seconds/step") is not None]
    if not lines:
        return None
    parts = {phase: [line.get(f"seconds/{phase}") or 0.0 for line in lines] for phase in (*PHASES, *OVERHEAD)}
    phase_sums = [sum(parts[phase][k] for phase in PHASES) for k in range(len(lines))]
    parts["other"] = [max(line["seconds/step"] - phases, 0.0) for line, phases in zip(lines, phase_sums, strict=True)]
    shown = {phase: parts[phase] for phase in (*PHASES, "other", *OVERHEAD) if any(parts[phase])}
    caption = f"{_median_step(lines)} Evaluations, snapshots and checkpoints (save) are extra (the last two in the next step)."
    if (count := steps_per_column(len(lines))) > 1:
        caption += f" Each column: the mean of {count} steps."
    return stacked("Seconds of a step", caption, [line["step"] for line in lines], shown)


_OWN: Mapping[str, Callable[[RunFiles], Section | None]] = {"sft": _sft, "rm": _rm, "ppo": _ppo}
"""Stages whose charts are chosen."""


def _median_step(lines: Sequence[Line]) -> str:
    """A sentence on the duration of a step. lines: metrics with `seconds/step`."""
    lines, steps_text = without_first(lines)
    return f"A step takes {median(line['seconds/step'] for line in lines):,.1f} s ({steps_text})."


def without_first(lines: Sequence[Line]) -> tuple[Sequence[Line], str]:
    """The lines without the first step (warm-up), unless it is the only one; and a text for their median."""
    rest = lines[1:] or lines
    first, last = rest[0]["step"], rest[-1]["step"]
    return rest, f"median of steps {first:,} to {last:,}" if len(rest) > 1 else f"step {first:,}"
