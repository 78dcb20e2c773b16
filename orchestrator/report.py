"""report.html: one self-contained page that shows what a run did and what came of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from configs.schema import ROLES, AdaptiveKL, DatasetSettings, PPOSettings, RunConfig
from orchestrator.charts import AFTER, SERIES, Chart, Series, curves, distributions, effects, moving_window, stacked
from orchestrator.history import history
from orchestrator.integrity import write_text
from orchestrator.intervals import Interval, distinct_share, mean_interval, paired_interval
from orchestrator.metrics import read_lines, read_metrics
from orchestrator.outcome import scored_pairs
from orchestrator.progress import clock

STAGES = {"sft": "Supervised fine-tuning", "rm": "Reward model", "ppo": "PPO"}
MINUS = "\N{MINUS SIGN}"
PHASES = ("generate", "score", "train", "publish")


def write_report(run_folder: Path) -> Path:
    """Write report.html into the run folder from what lies there, and return its path.

    Reads config.yaml, and of the following what there is (a run may be unfinished): metrics.jsonl; summary.json,
    `{"stages": {stage: {name: number}}, "hardware": {..}, "versions": {..}, "seconds": {part of the run: seconds}}`;
    evaluation/before.jsonl and after.jsonl, one line per held-out prompt, in the same order:
    `{"prompt", "answer", "reward", "judges": {name: score}, "kl": nats per token, "tokens"}`.

    Raises:
        ValueError: the two evaluations are not of the same prompts, or a line is not JSON; names file and line.
    """
    run = _Run.read(run_folder)
    page = _environment().get_template("report.html.j2").render(
        name=run.config.name,
        facts=_facts(run) | history(run_folder),
        tiles=_tiles(run),
        comparison=_comparison(run) if run.pairs else None,
        stages=[stage for stage in (_sft(run), _rm(run), _ppo(run)) if stage is not None],
        samples=_samples(run),
        names=run.names,
        numbers={STAGES.get(stage, stage): _shown(numbers) for stage, numbers in run.summary.get("stages", {}).items()},
        hardware=_shown(run.summary.get("hardware", {})),
        versions=_shown(run.summary.get("versions", {})),
        settings=run.config_text,
    )  # fmt: skip
    path = run_folder / "report.html"
    write_text(path, page)
    return path


def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


# ---------------------------------------------------------------- what the run left


@dataclass(frozen=True)
class _Pair:
    """One held-out prompt's answers."""

    before: Mapping[str, Any]
    after: Mapping[str, Any]


@dataclass(frozen=True)
class _Run:
    config: RunConfig
    config_text: str
    metrics: Sequence[Mapping[str, Any]]
    summary: Mapping[str, Any]
    pairs: Sequence[_Pair]

    @classmethod
    def read(cls, folder: Path) -> _Run:
        text = (folder / "config.yaml").read_text(encoding="utf-8")
        summary = folder / "summary.json"
        return cls(
            config=RunConfig.model_validate(yaml.safe_load(text)),
            config_text=text,
            metrics=read_metrics(folder),
            summary=json.loads(summary.read_text(encoding="utf-8")) if summary.exists() else {},
            pairs=_read_pairs(folder / "evaluation"),
        )

    @property
    def names(self) -> tuple[str, str]:
        """What the models before and after PPO are called."""
        return ("SFT" if self.config.sft else "Before PPO", "PPO")

    def curve(self, stage: str, metric: str) -> tuple[list[int], list[float]]:
        """Steps and values of a metric; steps without a finite value are left out."""
        lines = [line for line in self.metrics if line["stage"] == stage and line.get(metric) is not None]
        return [line["step"] for line in lines], [line[metric] for line in lines]

    def steps(self, stage: str) -> int:
        return max((line["step"] for line in self.metrics if line["stage"] == stage), default=0)

    def below(self, stage: str, prefix: str) -> list[str]:
        """Last parts of the stage's metrics `prefix/...`, in the order of their first line."""
        names = {name: None for line in self.metrics if line["stage"] == stage for name in line}
        return [name.removeprefix(prefix + "/") for name in names if name.startswith(prefix + "/")]


def _read_pairs(folder: Path) -> list[_Pair]:
    paths = folder / "before.jsonl", folder / "after.jsonl"
    if not all(path.exists() for path in paths):
        return []
    before, after = (read_lines(path) for path in paths)
    if len(before) != len(after):
        raise ValueError(f"{paths[1]}: {len(after)} prompts, but {paths[0]} has {len(before)}")
    for number, (one, other) in enumerate(zip(before, after, strict=True), start=1):
        if one["prompt"] != other["prompt"]:
            raise ValueError(f"{paths[1]}:{number}: another prompt than in {paths[0]}: {other['prompt'][:80]!r}")
    return [_Pair(one, other) for one, other in zip(before, after, strict=True)]


# ---------------------------------------------------------------- header


def _facts(run: _Run) -> dict[str, str]:
    """What was run, on what, and for how long."""
    config, summary = run.config, run.summary
    model = [config.model.path, config.model.dtype]
    if config.model.init == "random":
        model.append("from scratch")
    if config.model.lora:
        model.append(f"LoRA rank {config.model.lora.rank}")
    trained = [stage for stage in STAGES if run.steps(stage)]
    facts = {
        "Model": " · ".join(model),
        "Data": " · ".join(_datasets(config)),
        "Stages": " → ".join(f"{STAGES[stage]} ({run.steps(stage):,} steps)" for stage in trained),
    }
    if seconds := summary.get("seconds"):
        parts = ", ".join(f"{STAGES.get(part, part)} {clock(value)}" for part, value in seconds.items())
        facts["Duration"] = f"{clock(sum(seconds.values()))} ({parts})"
    facts["Roles"] = _placement(config) if config.ppo else ""
    facts["Hardware"] = " · ".join(f"{value} {name}" for name, value in _shown(summary.get("hardware", {})).items())
    facts["Versions"] = " · ".join(f"{name} {value}" for name, value in _shown(summary.get("versions", {})).items())
    facts["Seed"] = str(config.seed)
    if run.metrics:
        facts["Last record"] = f"{datetime.fromtimestamp(run.metrics[-1]['time'], UTC):%Y-%m-%d %H:%M} UTC"
    return {name: text for name, text in facts.items() if text}


def _datasets(config: RunConfig) -> list[str]:
    """The datasets of the stages, each once."""
    used: list[DatasetSettings] = [stage.train for stage in (config.sft, config.rm) if stage]
    if config.ppo:
        used.append(config.ppo.prompts)
    return list(dict.fromkeys(data.name + (f" [{data.split}]" if data.split else "") for data in used))


def _placement(config: RunConfig) -> str:
    if groups := config.placement.groups:
        return " | ".join(f"{' + '.join(group.roles)} on {group.devices}" for group in groups)
    return f"{config.placement.layout} placement groups"


# ---------------------------------------------------------------- headline numbers


@dataclass(frozen=True)
class _Tile:
    label: str
    value: str
    detail: str


def _tiles(run: _Run) -> list[_Tile]:
    return [*_outcome_tiles(run), *_training_tiles(run)]


def _outcome_tiles(run: _Run) -> list[_Tile]:
    if not run.pairs:
        return []
    before, after = _scores(run.pairs)
    tiles = []
    if len(before) > 1 and stdev(before) > 0:
        gain = (fmean(after) - fmean(before)) / stdev(before)
        tiles.append(_Tile("Reward gain, held out", f"{_signed(gain, 2)} SD", _from_to(before, after)))
    for judge in run.pairs[0].after["judges"]:
        before, after = _scores(run.pairs, judge)
        if before:
            change = _signed(fmean(after) - fmean(before), 3)
            tiles.append(_Tile(f"Judge {judge}, held out", change, _from_to(before, after)))
    answers = _answers(run.pairs, "after")
    tiles.append(_Tile("KL to the reference", f"{_kl_per_token(run.pairs, 'after'):.3f}", "nats per token, held out"))
    tiles.append(_Tile("Distinct answers", f"{distinct_share(answers):.0%}", f"of {len(answers):,} held-out prompts"))
    return tiles


def _training_tiles(run: _Run) -> list[_Tile]:
    tiles = []
    if accuracy := run.curve("rm", "validation/accuracy")[1]:
        tiles.append(_Tile("Held-out pairs ranked right", f"{accuracy[-1]:.1%}", "reward model"))
    if perplexity := run.curve("sft", "validation/perplexity")[1]:
        first = f"from {perplexity[0]:,.1f}" if len(perplexity) > 1 else "supervised fine-tuning"
        tiles.append(_Tile("Validation perplexity", f"{perplexity[-1]:,.1f}", first))
    if gap := run.curve("ppo", "log_prob_gap")[1]:
        tiles.append(_Tile("Largest log-prob gap", f"{max(gap):.1e}", "engine against trainer, mean |Δ| of a step"))
    if speed := run.curve("ppo", "tokens_per_second")[1]:
        tiles.append(_Tile("PPO speed", f"{median(speed):,.0f} tokens/s", "median step"))
    return tiles


# ---------------------------------------------------------------- before and after


@dataclass(frozen=True)
class _Row:
    measure: str
    before: str
    after: str
    change: str


@dataclass(frozen=True)
class _Comparison:
    count: int
    rows: Sequence[_Row]
    charts: Sequence[Chart]


def _comparison(run: _Run) -> _Comparison:
    pairs = run.pairs
    measures = {"Reward": _scores(pairs)} | {
        f"Judge: {judge}": _scores(pairs, judge) for judge in pairs[0].after["judges"]
    }
    measures = {name: scores for name, scores in measures.items() if scores[0]}
    tokens = [float(pair.before["tokens"]) for pair in pairs], [float(pair.after["tokens"]) for pair in pairs]
    rows = [_row(name, *values, digits=3) for name, values in measures.items()]
    rows.append(_row("Tokens per answer", *tokens, digits=1))
    before, after = (f"{_kl_per_token(pairs, side):.3f}" for side in ("before", "after"))
    rows.append(_Row("KL to the reference, nats per token", before, after, "—"))
    before, after = (f"{distinct_share(_answers(pairs, side)):.1%}" for side in ("before", "after"))
    rows.append(_Row("Distinct answers", before, after, "—"))

    charts: list[Chart] = []
    if "Reward" in measures:
        caption = "Each held-out prompt answered once by either model; dashed: the means. Outermost 1% in the end bars."
        charts.append(distributions("Rewards of the answers", caption, *measures["Reward"], names=run.names))
    scaled = {name: _standardised(*values) for name, values in measures.items()}
    if known := {name: change for name, change in scaled.items() if change is not None}:
        caption = (
            f"Mean paired change with its 95% interval, in standard deviations of the {run.names[0]} model's scores."
        )
        charts.append(effects("Change on held-out prompts", caption, known))
    return _Comparison(len(pairs), rows, charts)


def _row(measure: str, before: Sequence[float], after: Sequence[float], digits: int) -> _Row:
    return _Row(
        measure,
        _interval(mean_interval(before), digits),
        _interval(mean_interval(after), digits),
        _interval(paired_interval(before, after), digits, signed=True),
    )


def _standardised(before: Sequence[float], after: Sequence[float]) -> Interval | None:
    """The paired change in deviations of `before`; None where they are all alike, or there is one only."""
    if len(before) < 2 or stdev(before) == 0:
        return None
    change, scale = paired_interval(before, after), stdev(before)
    return Interval(change.mean / scale, change.low / scale, change.high / scale)


def _scores(pairs: Sequence[_Pair], judge: str | None = None) -> tuple[list[float], list[float]]:
    """The rewards, or a judge's scores, of the prompts whose two answers have one."""
    return scored_pairs([pair.before for pair in pairs], [pair.after for pair in pairs], judge)


def _answers(pairs: Sequence[_Pair], side: str) -> list[str]:
    return [getattr(pair, side)["answer"] for pair in pairs]


def _kl_per_token(pairs: Sequence[_Pair], side: str) -> float:
    """KL summed over all answers / their tokens, nats."""
    lines = [getattr(pair, side) for pair in pairs]
    return sum(line["kl"] * line["tokens"] for line in lines) / max(1, sum(line["tokens"] for line in lines))


@dataclass(frozen=True)
class _Sample:
    prompt: str
    before: str
    before_reward: str
    after: str
    after_reward: str
    better: bool


def _samples(run: _Run) -> list[_Sample]:
    """The first held-out prompts, as many as the settings ask for."""
    evaluation = run.config.ppo.evaluation if run.config.ppo else None
    return [
        _Sample(
            prompt=pair.before["prompt"],
            before=pair.before["answer"],
            before_reward=_signed_or_none(pair.before["reward"], 2),
            after=pair.after["answer"],
            after_reward=_signed_or_none(pair.after["reward"], 2),
            better=None not in (scores := (pair.before["reward"], pair.after["reward"])) and scores[1] > scores[0],
        )
        for pair in run.pairs[: evaluation.samples if evaluation else 0]
    ]


# ---------------------------------------------------------------- the stages


@dataclass(frozen=True)
class _Stage:
    key: str
    title: str
    summary: str
    charts: Sequence[Chart]


def _stage(
    run: _Run, key: str, closing: Mapping[str, Callable[[float], str]], charts: Sequence[Chart | None]
) -> _Stage | None:
    """A stage's section; None where it recorded nothing. `closing`: metrics whose last values stand below the title."""
    drawn = [chart for chart in charts if chart is not None]
    if not drawn:
        return None
    last = {metric: values[-1] for metric in closing if (values := run.curve(key, metric)[1])}
    parts = [f"{run.steps(key):,} steps", *(closing[metric](value) for metric, value in last.items())]
    smoothed = ". Thin lines: each step; bold: moving mean." if moving_window(run.steps(key)) > 1 else ""
    return _Stage(key, STAGES[key], " · ".join(parts) + smoothed, drawn)


def _lines(run: _Run, stage: str, metrics: Mapping[str, str], points: frozenset[str] = frozenset()) -> list[Series]:
    """One series for each of the metrics (name -> label) that the stage recorded."""
    series = []
    for color, (metric, label) in zip(SERIES * len(metrics), metrics.items(), strict=False):
        steps, values = run.curve(stage, metric)
        if values:
            series.append(Series(label, steps, values, color, points=metric in points))
    return series


def _chart(run: _Run, stage: str, title: str, caption: str, metrics: Mapping[str, str], **options: Any) -> Chart | None:
    """Curves of the metrics (name -> label) that there are; those below validation/ and evaluation/ as points."""
    points = frozenset(metric for metric in metrics if metric.startswith(("validation/", "evaluation/")))
    series = _lines(run, stage, metrics, points)
    return curves(title, caption, series, **options) if series else None


def _sft(run: _Run) -> _Stage | None:
    loss = {"loss": "training", "validation/loss": "validation"}
    return _stage(
        run,
        "sft",
        {
            "validation/loss": lambda value: f"validation loss {value:.3f}",
            "validation/perplexity": lambda value: f"perplexity {value:,.1f}",
        },
        [
            _chart(run, "sft", "Loss", "Nats per completion token.", loss),
            _chart(run, "sft", "Gradient norm", "Before clipping.", {"grad_norm": "model"}),
            _chart(run, "sft", "Tokens per second", "Of each step, over all ranks.", {"tokens_per_second": "tokens/s"}),
        ],
    )


def _rm(run: _Run) -> _Stage | None:
    accuracy = {"accuracy": "training", "validation/accuracy": "held out"}
    loss = {"loss": "training", "validation/loss": "held out"}
    return _stage(
        run,
        "rm",
        {"validation/accuracy": lambda value: f"{value:.1%} of held-out pairs right"},
        [
            _chart(run, "rm", "Pairs ranked right", "Share; a coin gets 50%.", accuracy, percent=True, wide=True),
            _chart(run, "rm", "Pairwise loss", "Bradley-Terry, nats; a coin gets 0.693.", loss),
        ],
    )


def _ppo(run: _Run) -> _Stage | None:
    if run.config.ppo is None:
        return None
    show = lambda *args, **options: _chart(run, "ppo", *args, **options)  # noqa: E731
    return _stage(
        run,
        "ppo",
        {
            "reward/mean": lambda value: f"reward {_signed(value, 3)} in the last step",
            "kl": lambda value: f"KL {value:.3f}",
        },
        [
            _reward(run),
            *_policy_charts(run, run.config.ppo, show),
            _seconds(run),
            show(
                "Tokens per second",
                "Of each step.",
                {"tokens_per_second": "tokens/s"},
            ),
            show(
                "Memory per process",
                "GiB of each role's workers and of the driver.",
                {f"memory_gib/{who}": who for who in (*ROLES, "driver")},
                wide=True,
            ),
        ],
    )


def _policy_charts(run: _Run, settings: PPOSettings, show: Callable[..., Chart | None]) -> list[Chart | None]:
    control = settings.kl.control
    target = (control.target, "target") if isinstance(control, AdaptiveKL) else None
    sources = run.below("ppo", "reward")
    by_source = {f"reward/{name}": name for name in sources if name not in ("mean", "std")}
    bound = (settings.max_log_prob_gap or run.config.gap_bound(run.config.model), "bound")
    kl = {"kl": "training", "evaluation/kl": "held out"}
    norms = {"grad_norm/actor": "actor", "grad_norm/critic": "critic"}
    explained = "Share of the returns' variance that the critic predicts; 1 is all."
    return [
        show("KL to the reference", "Nats per token.", kl, line=target),
        show("KL coefficient", "Weight of the penalty.", {"kl_coefficient": "coefficient"}) if target else None,
        show("Reward by source", "Mean of a step, before weights.", by_source) if len(by_source) > 1 else None,
        show("Entropy", "Of the policy, nats per token.", {"entropy": "entropy"}),
        show("Length", "Tokens, mean of a step.", {"length/answer": "answer", "length/prompt": "prompt"}),
        show("Answers without an end", "Share cut off at the token limit.", {"missing_eos": "cut off"}, percent=True),
        show("Explained variance", explained, {"explained_variance": "critic"}),
        show("Value loss", "Of the critic.", {"loss/value": "critic"}),
        show("Clip fraction", "Tokens whose ratio left the clip range.", {"clip_fraction": "tokens"}, percent=True),
        show("Gradient norms", "Before clipping.", norms),
        show("Log-prob gap", "Engine against trainer, mean |Δ|.", {"log_prob_gap": "gap"}, line=bound, log=True),
    ]


def _reward(run: _Run) -> Chart | None:
    lines = [line for line in run.metrics if line["stage"] == "ppo"]
    known = [line for line in lines if None not in (line.get("reward/mean"), line.get("reward/std"))]
    if not known:
        return None
    steps, means = [line["step"] for line in known], [line["reward/mean"] for line in known]
    low = [line["reward/mean"] - line["reward/std"] for line in known]
    high = [line["reward/mean"] + line["reward/std"] for line in known]
    series = [Series("training prompts", steps, means, AFTER, low, high)]
    ends = "evaluation/reward", "evaluation/reward_ci_low", "evaluation/reward_ci_high"
    if held_out := [line for line in lines if all(line.get(name) is not None for name in ends)]:
        values, low, high = ([line[name] for line in held_out] for name in ends)
        steps = [line["step"] for line in held_out]
        series.append(Series("held-out prompts, 95% interval", steps, values, SERIES[1], low, high, points=True))
    return curves("Reward", "Band: one standard deviation of the answers of a step.", series, wide=True)


def _seconds(run: _Run) -> Chart | None:
    found = run.below("ppo", "seconds")
    phases = [phase for phase in PHASES if phase in found] + [phase for phase in found if phase not in PHASES]
    lines = [line for line in run.metrics if any(line.get(f"seconds/{phase}") is not None for phase in phases)]
    if not lines:
        return None
    parts = {phase: [line.get(f"seconds/{phase}") or 0.0 for line in lines] for phase in phases}
    total = median(sum(values) for values in zip(*parts.values(), strict=True))
    caption = f"Time of a step by phase; the median step takes {total:.1f} s."
    return stacked("Seconds per phase", caption, [line["step"] for line in lines], parts)


# ---------------------------------------------------------------- numbers as text


def _signed(value: float, digits: int) -> str:
    return f"{value:+z.{digits}f}".replace("-", MINUS)


def _signed_or_none(value: float | None, digits: int) -> str:
    return "no score" if value is None else _signed(value, digits)


def _interval(interval: Interval, digits: int, signed: bool = False) -> str:
    """Mean [low, high]; the mean alone where the interval is infinite."""
    sign = "+" if signed else ""
    mean, low, high = (f"{value:{sign}z,.{digits}f}".replace("-", MINUS) for value in interval)
    return mean if "inf" in low else f"{mean} [{low}, {high}]"


def _from_to(before: Sequence[float], after: Sequence[float]) -> str:
    return f"{_signed(fmean(before), 3)} → {_signed(fmean(after), 3)}"


def _shown(values: Mapping[str, Any]) -> dict[str, str]:
    """Values as text: numbers rounded to four digits."""

    def show(value: Any) -> str:
        if isinstance(value, float):
            return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
        if isinstance(value, int) and not isinstance(value, bool):
            return f"{value:,}"
        return value if isinstance(value, str) else json.dumps(value)

    return {name: show(value) for name, value in values.items()}
