"""report.html: one self-contained page with a run's settings, curves and results."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from configs.schema import BatchSettings, DatasetSettings, RunConfig
from orchestrator.evaluation import Interval, distinct_share, mean_interval, mean_kl, paired_interval, scored_pairs
from orchestrator.number_text import MINUS, clock, percent, signed
from orchestrator.report.charts import Chart, distributions, effects
from orchestrator.report.history import history
from orchestrator.report.run_files import Pair, RunFiles
from orchestrator.report.stages import sections, title, without_first
from orchestrator.storage import write_text
from placement.stages import STAGES
from workers.data.tokens import Counts

SHOWN_ANSWERS = 4
"""Training answers on the page."""


def write_report(run_folder: Path) -> Path:
    """Write report.html from the files of a run's folder, into that folder. Returns its path.

    Reads config.yaml and these files, which may be missing in an unfinished run: metrics.jsonl; samples/ppo.jsonl;
    status.json; summary.json,
    `{"stages": {stage: {name: number}}, "data": {setting of a dataset: its Counts}, "hardware": {..}, "versions": {..},
    "seconds": {stage: seconds}}`;
    evaluation/before.jsonl and after.jsonl, one line per held-out prompt, in the same order:
    `{"prompt", "answer", "reward", "judges": {name: score}, "kl": nats per token, "tokens"}`.

    Raises:
        ValueError: the two evaluations have different prompts, or a line is not JSON; names file and line.
    """
    run = RunFiles.read(run_folder)
    page = _environment().get_template("report.html.j2").render(
        name=run.config.name,
        facts=_facts(run) | history(run_folder),
        tiles=[*_before_after_tiles(run), *_training_tiles(run)],
        comparison=_comparison(run) if run.pairs else None,
        stages=sections(run),
        samples=_samples(run),
        training=_training_answers(run),
        names=run.names(),
        started=run.started_from(),
        numbers={title(stage): _shown(numbers) for stage, numbers in run.summary.get("stages", {}).items()},
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


# ---------------------------------------------------------------- header


def _facts(run: RunFiles) -> dict[str, str]:
    """Model, data, stages, duration, hardware and versions."""
    config, summary = run.config, run.summary
    model = [config.model.path, config.model.dtype]
    if config.model.init == "random":
        model.append("from scratch")
    if config.model.lora:
        model.append(f"LoRA rank {config.model.lora.rank}")
    trained = [stage for stage in STAGES if run.steps(stage)]
    facts = {
        "Model": " · ".join(model),
        "Data": " · ".join(_datasets(config, trained)),
        "Rows": " · ".join(_rows(run, trained)),
        "Stages": " → ".join(f"{title(stage)} ({_steps(run, stage)})" for stage in trained),
    }
    if run.seconds:
        parts = ", ".join(f"{title(part)} {clock(value)}" for part, value in run.seconds.items())
        facts["Duration"] = f"{clock(sum(run.seconds.values()))} ({parts})"
    facts["Roles"] = _placement(config) if "ppo" in trained else ""
    facts["Hardware"] = " · ".join(f"{name}: {value}" for name, value in _shown(summary.get("hardware", {})).items())
    facts["Versions"] = " · ".join(f"{name} {value}" for name, value in _shown(summary.get("versions", {})).items())
    facts["Seed"] = str(config.seed)
    if run.metrics:
        facts["Last record"] = f"{datetime.fromtimestamp(run.metrics[-1]['time'], UTC):%Y-%m-%d %H:%M} UTC"
    return {name: text for name, text in facts.items() if text}


def _steps(run: RunFiles, stage: str) -> str:
    return f"{run.steps(stage):,} steps" + ("" if run.finished(stage) else ", not finished")


def _datasets(config: RunConfig, stages: Sequence[str]) -> list[str]:
    """Names of the stages' training datasets, without duplicates."""
    datasets: list[DatasetSettings] = [
        section.train for stage in stages if isinstance(section := config.section(stage), BatchSettings)
    ]
    if "ppo" in stages and config.ppo:
        datasets.append(config.ppo.prompts)
    return list(dict.fromkeys(data.name + (f" [{data.split}]" if data.split else "") for data in datasets))


def _rows(run: RunFiles, stages: Sequence[str]) -> list[str]:
    """The row counts of the stages' datasets, as printed when the run began."""
    all_counts: dict[str, dict[str, Any]] = run.summary.get("data", {})
    return [
        f"{setting}: {Counts(**counts).describe()}"
        for setting, counts in all_counts.items()
        if setting.partition(".")[0] in stages
    ]


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


def _before_after_tiles(run: RunFiles) -> list[_Tile]:
    if not run.pairs:
        return []
    tiles = []
    before, after = _scores(run.pairs)
    if len(before) > 1 and stdev(before) > 0:
        gain = (fmean(after) - fmean(before)) / stdev(before)
        tiles.append(_Tile("Reward gain (std), held out", signed(gain, 2), _from_to(before, after)))
    for judge in _judges(run.pairs):
        before, after = _scores(run.pairs, judge)
        if before:
            gain = fmean(after) - fmean(before)
            tiles.append(_Tile(f"Judge {judge}, held out", signed(gain, 3), _from_to(before, after)))
    responses = _responses(run.pairs, "after")
    if (kl := mean_kl([pair.after for pair in run.pairs])) is not None:
        tiles.append(_Tile("KL to the reference", f"{kl:z.3f}", "nats per token, held out, after PPO"))
    detail = f"of the {len(responses):,} held-out responses after PPO"
    tiles.append(_Tile("Distinct responses", percent(distinct_share(responses)), detail))
    return tiles


def _training_tiles(run: RunFiles) -> list[_Tile]:
    tiles = []
    if accuracy := run.last("rm", "validation/accuracy"):
        step, value = accuracy
        tiles.append(_Tile("Preference accuracy, held out", percent(value), f"reward model, after step {step:,}"))
    steps, perplexity = run.curve("sft", "validation/perplexity")
    if perplexity:
        earlier = f"; {perplexity[0]:,.1f} after step {steps[0]:,}" if len(perplexity) > 1 else ""
        tiles.append(
            _Tile("Validation perplexity", f"{perplexity[-1]:,.1f}", f"SFT, after step {steps[-1]:,}{earlier}")
        )
    if gap := run.curve("ppo", "logprob_mismatch")[1]:
        detail = f"engine vs trainer, mean |Δ|, largest of {len(gap):,} steps"
        tiles.append(_Tile("Largest logprob mismatch", f"{max(gap):.1e}", detail))
    if lines := [line for line in run.lines("ppo") if line.get("tokens_per_second") is not None]:
        timed, steps_text = without_first(lines)
        speed = median(line["tokens_per_second"] for line in timed)
        tiles.append(_Tile("PPO speed", f"{speed:,.0f} tokens/s", f"of responses, {steps_text}"))
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


def _comparison(run: RunFiles) -> _Comparison:
    pairs, names = run.pairs, run.names()
    measures = {"Reward": _scores(pairs)} | {f"Judge: {judge}": _scores(pairs, judge) for judge in _judges(pairs)}
    measures = {name: values for name, values in measures.items() if values[0]}
    rows = [_row(_of(name, len(values[0]), len(pairs)), *values, digits=3) for name, values in measures.items()]
    tokens = [float(pair.before["tokens"]) for pair in pairs], [float(pair.after["tokens"]) for pair in pairs]
    rows.append(_row("Tokens per response", *tokens, digits=1))
    kls = [mean_kl([getattr(pair, side) for pair in pairs]) for side in ("before", "after")]
    if None not in kls:
        rows.append(_Row("KL to the reference, nats per token", f"{kls[0]:z.3f}", f"{kls[1]:z.3f}", "—"))
    before, after = (percent(distinct_share(_responses(pairs, side))) for side in ("before", "after"))
    rows.append(_Row("Distinct responses", before, after, "—"))

    charts = []
    if "Reward" in measures:
        caption = (
            "One response of each model to every held-out prompt; dashed: means. The end bars contain the outermost 1%."
        )
        charts.append(distributions("Rewards of the responses", caption, *measures["Reward"], names=names))
    all_changes = {name: _standardized(*values) for name, values in measures.items()}
    if changes := {name: change for name, change in all_changes.items() if change is not None}:
        caption = (
            f"Mean paired change with its 95% interval, in standard deviations of the scores of {run.started_from()}."
        )
        charts.append(effects("Change on held-out prompts", caption, changes))
    return _Comparison(len(pairs), rows, charts)


def _of(measure: str, scored: int, prompts: int) -> str:
    return measure if scored == prompts else f"{measure} ({scored:,} of {prompts:,} prompts have both scores)"


def _row(measure: str, before: Sequence[float], after: Sequence[float], digits: int) -> _Row:
    return _Row(
        measure,
        _interval(mean_interval(before), digits),
        _interval(mean_interval(after), digits),
        _interval(paired_interval(before, after), digits, plus=True),
    )


def _standardized(before: Sequence[float], after: Sequence[float]) -> Interval | None:
    """The paired change in standard deviations of `before`; None if these are all equal, or only one."""
    if len(before) < 2 or stdev(before) == 0:
        return None
    change, scale = paired_interval(before, after), stdev(before)
    return Interval(change.mean / scale, change.low / scale, change.high / scale)


def _judges(pairs: Sequence[Pair]) -> list[str]:
    return list(pairs[0].before["judges"])


def _scores(pairs: Sequence[Pair], judge: str | None = None) -> tuple[list[float], list[float]]:
    """Rewards, or a judge's scores, before and after, of the prompts with a score for both responses."""
    return scored_pairs([pair.before for pair in pairs], [pair.after for pair in pairs], judge)


def _responses(pairs: Sequence[Pair], side: str) -> list[str]:
    return [getattr(pair, side)["answer"] for pair in pairs]


# ---------------------------------------------------------------- responses


@dataclass(frozen=True)
class _Sample:
    prompt: str
    before: str
    before_reward: str
    after: str
    after_reward: str
    tone: str
    """better, worse or empty: the reward after PPO compared with the reward before."""


def _samples(run: RunFiles) -> list[_Sample]:
    """The first `ppo.evaluation.samples` held-out prompts."""
    evaluation = run.config.ppo.evaluation if run.config.ppo else None
    pairs = run.pairs[: evaluation.samples if evaluation else 0]
    return [
        _Sample(
            prompt=pair.before["prompt"],
            before=pair.before["answer"],
            before_reward=_score(pair.before["reward"]),
            after=pair.after["answer"],
            after_reward=_score(pair.after["reward"]),
            tone=_tone(pair.before["reward"], pair.after["reward"]),
        )
        for pair in pairs
    ]


def _tone(before: float | None, after: float | None) -> str:
    if before is None or after is None or before == after:
        return ""
    return "better" if after > before else "worse"


@dataclass(frozen=True)
class _Answer:
    prompt: str
    answer: str
    reward: str
    details: str


@dataclass(frozen=True)
class _TrainingAnswers:
    step: int
    answers: Sequence[_Answer]


def _training_answers(run: RunFiles) -> _TrainingAnswers | None:
    """Some of the logged answers of the last logged step."""
    if not run.samples:
        return None
    answers = []
    for line in run.samples[:SHOWN_ANSWERS]:
        details = [] if line["kl"] is None else [f"KL {line['kl']:z.3f} nats per token"]
        details.append(f"{line['tokens']:,} tokens")
        details += [] if line["ended"] else ["truncated at the token limit"]
        if len(line["rewards"]) > 1:
            details += [f"{name} {_score(value)}" for name, value in line["rewards"].items()]
        answers.append(_Answer(line["prompt"], line["answer"], _score(line["reward"]), " · ".join(details)))
    return _TrainingAnswers(run.samples[0]["step"], answers)


# ---------------------------------------------------------------- numbers as text


def _score(value: float | None) -> str:
    return "no score" if value is None else signed(value, 2)


def _interval(interval: Interval, digits: int, plus: bool = False) -> str:
    """`mean [low, high]`; only the mean if the interval is infinite."""
    sign = "+" if plus else ""
    mean, low, high = (f"{value:{sign}z,.{digits}f}".replace("-", MINUS) for value in interval)
    return mean if "inf" in low else f"{mean} [{low}, {high}]"


def _from_to(before: Sequence[float], after: Sequence[float]) -> str:
    return f"{signed(fmean(before), 3)} → {signed(fmean(after), 3)}, {len(before):,} prompts"


def _shown(values: Mapping[str, Any]) -> dict[str, str]:
    """Values as text; numbers are rounded to four digits."""

    def show(value: Any) -> str:
        if isinstance(value, float):
            return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
        if isinstance(value, int) and not isinstance(value, bool):
            return f"{value:,}"
        return value if isinstance(value, str) else json.dumps(value)

    return {name: show(value) for name, value in values.items()}
