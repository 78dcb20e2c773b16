"""The preflight: all checks that are possible before a run starts, for all its stages.

    report = run_preflight(run, jobs, checks)   reads, tokenizes and counts the data of all stages, and checks every model
    report.raise_if_refused()                   all problems at once

`troupe check CONFIG` prints the report and starts nothing; every run makes it before its first stage.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, Protocol

from configs.schema import DatasetSettings, ModelSettings
from orchestrator.preflight.model_checks import ModelUse, check_models, check_reader, check_serving, unreadable
from orchestrator.preflight.settings_checks import Check, is_missing
from orchestrator.run import Run, RunError, foreseen_cluster
from placement.cluster import Cluster
from placement.memory import resolve, with_ddp_for_auto
from placement.plan import make_plan, predicted_dtype, with_dtype
from placement.types import PlanError, Stage
from workers.data import Codec, Counts, DataError, Row, RowKind, read_rows


class Problem(NamedTuple):
    """Why a run cannot start: the setting's dotted path ("" if the text names it), what is wrong, and how to fix it."""

    setting: str
    text: str

    def __str__(self) -> str:
        return f"{self.setting}: {self.text}" if self.setting else self.text


class PreflightError(RunError):
    """A run cannot start. `problems` lists all problems."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(map(str, problems)))


@dataclass(frozen=True)
class Input:
    """A dataset that a stage needs."""

    name: str
    """The stage's name for it."""
    setting: str
    """Dotted path of its settings."""
    data: DatasetSettings
    kind: RowKind
    encode: Callable[[Codec, list[Row]], tuple[Any, Counts]]
    """Encodes its rows as token ids."""


class Job(Protocol):
    """A stage, as the preflight sees it."""

    @property
    def name(self) -> Stage: ...

    def inputs(self) -> list[Input]: ...

    def text_model(self) -> tuple[str, str, ModelSettings]:
        """Setting, path and settings of the model whose tokenizer encodes the stage's data."""

    def models(self) -> list[ModelUse]:
        """The stage's models that exist before the run starts."""

    def readers(self) -> list[ModelUse]:
        """The models that read the policy's tokens, or from which such models will be trained."""

    def take(self, name: str, encoded: Any, counts: Counts) -> None:
        """Keep a dataset's token ids."""

    def data_checks(self) -> Iterable[Check]:
        """Further checks of the datasets, once all are kept; each raises an error for a problem."""


@dataclass
class Report:
    """Problems and notes of a preflight."""

    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """Warnings, which do not refuse the run."""
    counts: dict[str, Counts] = field(default_factory=dict)
    """Setting of a dataset -> its row counts."""
    seconds: float = 0.0

    def refuse(self, setting: str, text: str) -> None:
        """Record a problem. A problem that several settings cause is recorded once."""
        if text not in (problem.text for problem in self.problems):
            self.problems.append(Problem(setting, text))

    @contextmanager
    def collecting(self, setting: str = "") -> Iterator[None]:
        """Record an error of the block as a problem."""
        try:
            yield
        except PlanError as error:
            for problem in error.problems:
                self.refuse(*problem)
        except (RunError, ValueError, LookupError, OSError) as error:
            self.refuse(setting, str(error).strip() or type(error).__name__)

    def raise_if_refused(self) -> None:
        """Raises PreflightError with all problems."""
        if self.problems:
            raise PreflightError(self.problems)

    def lines(self) -> list[str]:
        """A line for each dataset and each note."""
        width = max(map(len, self.counts), default=0)
        rows = [f"{setting.ljust(width)}  {c.describe()}" for setting, c in self.counts.items()]
        return [*rows, *(f"note: {note}" for note in self.notes)]


def run_preflight(run: Run, jobs: Sequence[Job], checks: Iterable[Check]) -> Report:
    """Check everything, and give the jobs their encoded data. checks: those of the settings."""
    started, report = time.monotonic(), Report()
    for check in checks:
        with report.collecting():
            check()
    cache = _DataCache(run)
    for job in jobs:
        setting, path, settings = job.text_model()
        codec: Codec | None = None
        if not is_missing(path):  # a missing model is reported by the settings checks
            with report.collecting(setting):
                codec = cache.codec(path, settings)
        inputs: list[Input] = []
        with report.collecting():
            inputs = job.inputs()
        for dataset in inputs:
            with report.collecting(dataset.setting):
                rows = cache.rows(dataset)
                if codec is not None:
                    _encode(report, cache, job, dataset, codec, rows)
        if all(dataset.setting in report.counts for dataset in inputs):
            for check in job.data_checks():
                with report.collecting():
                    check()
        if codec is not None:
            _check_readers(report, cache, job, codec)
    cluster: Cluster | None = None
    with report.collecting():
        cluster = foreseen_cluster(run.config)
    uses = [use for job in jobs for use in job.models() if not is_missing(use.path)]
    _check_models(report, cache, run, cluster, uses)
    if cluster:
        _check_plans(report, run, cluster, [job.name for job in jobs])
    _compare_forms(report, run)
    report.seconds = time.monotonic() - started
    return report


def _check_readers(report: Report, cache: _DataCache, job: Job, policy: Codec) -> None:
    """Check that reward models have the policy's tokenization, in the forms of the stage's rows."""
    forms = {counts.form for setting, counts in report.counts.items() if setting.startswith(f"{job.name}.")}
    for use in (use for use in job.readers() if not is_missing(use.path)):
        with report.collecting(use.setting):
            codec = cache.codec(use.path, use.settings)
            for form in ("text", "chat"):
                if forms & {form, "mixed"}:
                    check_reader(policy, use, codec, form, report.refuse)


def _check_models(report: Report, cache: _DataCache, run: Run, cluster: Cluster | None, uses: list[ModelUse]) -> None:
    def codec_of(use: ModelUse) -> Codec | None:
        with suppress(DataError, ValueError, OSError):
            return cache.codec(use.path, use.settings)
        return None

    check_models(uses, codec_of, report.refuse)
    check_serving(uses, run.config, cluster, report.refuse)


def _check_plans(report: Report, run: Run, cluster: Cluster, stages: Sequence[Stage]) -> None:
    """Check that the stages can be placed, and that `strategy: auto` can be resolved."""
    config, problems_before = with_dtype(run.config, predicted_dtype(run.config, cluster)), len(report.problems)
    with report.collecting():
        external_models = run.external_models(stages)
        for stage in stages:
            with report.collecting():
                make_plan(with_ddp_for_auto(config), stage, cluster, external_models)
        if len(report.problems) == problems_before:
            resolve(config, stages, cluster, external_models)


def _compare_forms(report: Report, run: Run) -> None:
    """Add a note if the form of PPO's prompts differs from that of the SFT demonstrations."""
    prompts = report.counts.get("ppo.prompts")
    if prompts is None:
        return
    with suppress(RunError):  # another check reports it
        owner = run.owner("sft")
        demonstrations = report.counts.get("sft.train")
        if demonstrations:
            trained_form = demonstrations.form
        else:
            trained_form = owner.form("sft") if owner and owner.finished("sft") else prompts.form
        if trained_form != prompts.form:
            report.notes.append(
                f"ppo.prompts: {_FORMS[prompts.form]}, but the demonstrations of the policy's SFT stage are "
                f"{_FORMS[trained_form]}: the policy was trained on another form (chat_template)"
            )


_FORMS = {"text": "plain text", "chat": "conversations in the chat template", "mixed": "of both forms, text and chat"}


def _encode(report: Report, cache: _DataCache, job: Job, dataset: Input, codec: Codec, rows: list[Row]) -> None:
    encoded, counts = cache.encoded(dataset, codec, rows)
    if not counts.kept:
        raise DataError(f"{dataset.data.name}: no usable rows: {counts.describe()}")
    job.take(dataset.name, encoded, counts)
    report.counts[dataset.setting] = counts


class _DataCache:
    """Codecs, rows and token ids; each is made once."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._codecs: dict[tuple[str, str], Codec] = {}
        self._rows: dict[tuple[str, str], list[Row]] = {}
        self._encoded: dict[tuple[Any, ...], tuple[Any, Counts]] = {}

    def codec(self, path: str, settings: ModelSettings) -> Codec:
        key = path, settings.model_dump_json()
        if key not in self._codecs:
            try:
                self._codecs[key] = Codec.load(path, self._run.config, settings, self._run.started)
            except OSError as error:
                raise DataError(unreadable(path, error)) from error
        return self._codecs[key]

    def rows(self, dataset: Input) -> list[Row]:
        key = dataset.data.model_dump_json(), dataset.kind
        if key not in self._rows:
            self._rows[key] = read_rows(dataset.data, dataset.kind)
        return self._rows[key]

    def encoded(self, dataset: Input, codec: Codec, rows: list[Row]) -> tuple[Any, Counts]:
        encode = dataset.encode
        function = (encode.func, tuple(sorted(encode.keywords.items()))) if isinstance(encode, partial) else (encode,)
        key = id(codec), id(rows), *function
        if key not in self._encoded:
            self._encoded[key] = encode(codec, rows)
        return self._encoded[key]
