"""The preflight: all that can be known before anything starts, checked in one place, for all stages of a run.

    report = preflight(run, jobs)      reads, tokenises and counts the data of all stages, and looks at every model
    report.raise_if_refused()          all refusals at once

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
from orchestrator.run.ray_cluster import foreseen_cluster
from orchestrator.run.run_dir import Run, RunError
from placement.cluster import Cluster
from placement.memory import resolve, with_ddp_for_auto
from placement.plan import make_plan, predicted_dtype, with_dtype
from placement.types import PlanError, Stage
from workers.data import Codec, Counts, DataError, Row, RowKind, read_rows


class Problem(NamedTuple):
    """Why a run cannot start: the setting's dotted path ("" where the text names it), and what is wrong and what would fit."""

    setting: str
    text: str

    def __str__(self) -> str:
        return f"{self.setting}: {self.text}" if self.setting else self.text


class PreflightError(RunError):
    """A run that cannot start as asked. `problems` lists everything that is wrong."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(map(str, problems)))


@dataclass(frozen=True)
class Input:
    """A dataset that a stage needs."""

    name: str
    """What the stage knows it by."""
    setting: str
    """Dotted path of its settings."""
    data: DatasetSettings
    kind: RowKind
    encode: Callable[[Codec, list[Row]], tuple[Any, Counts]]
    """Makes token ids of its rows."""


class Job(Protocol):
    """What the preflight asks of a stage."""

    @property
    def name(self) -> Stage: ...

    def inputs(self) -> list[Input]: ...

    def text_model(self) -> tuple[str, str, ModelSettings]:
        """Setting, path and settings of the model whose tokenizer reads the stage's data."""

    def models(self) -> list[ModelUse]:
        """The models that the stage needs and that are there before the run starts."""

    def readers(self) -> list[ModelUse]:
        """The models that are to read the policy's tokens, or will be trained from these."""

    def take(self, name: str, encoded: Any, counts: Counts) -> None:
        """Keep a dataset's token ids."""

    def data_checks(self) -> Iterable[Check]:
        """Further checks of the datasets, once all are kept; each raises an error of what is wrong."""


@dataclass
class Report:
    """What a preflight found."""

    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What a user should know, though it refuses nothing."""
    counts: dict[str, Counts] = field(default_factory=dict)
    """Setting of a dataset -> what became of its rows."""
    seconds: float = 0.0

    def refuse(self, setting: str, text: str) -> None:
        """Note a problem; one that another setting leads to as well is noted once."""
        if text not in (problem.text for problem in self.problems):
            self.problems.append(Problem(setting, text))

    @contextmanager
    def collecting(self, setting: str = "") -> Iterator[None]:
        """An error in the block that says what is wrong with the settings becomes a problem of the report."""
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
        """The datasets and the notes, a line each."""
        width = max(map(len, self.counts), default=0)
        rows = [f"{setting.ljust(width)}  {c.describe()}" for setting, c in self.counts.items()]
        return [*rows, *(f"note: {note}" for note in self.notes)]


def preflight(run: Run, jobs: Sequence[Job], checks: Iterable[Check]) -> Report:
    """Check everything, and give the jobs their data. checks: of the settings."""
    started, report = time.monotonic(), Report()
    for check in checks:
        with report.collecting():
            check()
    readers = _Readers(run)
    for job in jobs:
        setting, path, settings = job.text_model()
        codec: Codec | None = None
        if not is_missing(path):  # else the checks of the settings have said so
            with report.collecting(setting):
                codec = readers.codec(path, settings)
        inputs: list[Input] = []
        with report.collecting():
            inputs = job.inputs()
        for wanted in inputs:
            with report.collecting(wanted.setting):
                rows = readers.rows(wanted)
                if codec is not None:
                    _encode(report, readers, job, wanted, codec, rows)
        if all(wanted.setting in report.counts for wanted in inputs):
            for check in job.data_checks():
                with report.collecting():
                    check()
        if codec is not None:
            _check_readers(report, readers, job, codec)
    cluster: Cluster | None = None
    with report.collecting():
        cluster = foreseen_cluster(run.config)
    uses = [use for job in jobs for use in job.models() if not is_missing(use.path)]
    _check_models(report, readers, run, cluster, uses)
    if cluster:
        _check_plans(report, run, cluster, [job.name for job in jobs])
    _compare_forms(report, run)
    report.seconds = time.monotonic() - started
    return report


def _check_readers(report: Report, readers: _Readers, job: Job, policy: Codec) -> None:
    """Whether reward models read what the policy writes, in the forms that the stage's rows have."""
    forms = {counts.form for setting, counts in report.counts.items() if setting.startswith(f"{job.name}.")}
    for use in (use for use in job.readers() if not is_missing(use.path)):
        with report.collecting(use.setting):
            codec = readers.codec(use.path, use.settings)
            for form in ("text", "chat"):
                if forms & {form, "mixed"}:
                    check_reader(policy, use, codec, form, report.refuse)


def _check_models(report: Report, readers: _Readers, run: Run, cluster: Cluster | None, uses: list[ModelUse]) -> None:
    def codec_of(use: ModelUse) -> Codec | None:
        with suppress(DataError, ValueError, OSError):
            return readers.codec(use.path, use.settings)
        return None

    check_models(uses, codec_of, report.refuse)
    check_serving(uses, run.config, cluster, report.refuse)


def _check_plans(report: Report, run: Run, cluster: Cluster, stages: Sequence[Stage]) -> None:
    """Whether the stages can be placed, and what `strategy: auto` asks for."""
    config, known = with_dtype(run.config, predicted_dtype(run.config, cluster)), len(report.problems)
    with report.collecting():
        taken = run.taken(stages)
        for stage in stages:
            with report.collecting():
                make_plan(with_ddp_for_auto(config), stage, cluster, taken)
        if len(report.problems) == known:
            resolve(config, stages, cluster, taken)


def _compare_forms(report: Report, run: Run) -> None:
    """Note where PPO asks in another form than the policy has learnt to answer."""
    asked = report.counts.get("ppo.prompts")
    if asked is None:
        return
    with suppress(RunError):  # which another check says
        owner = run.owner("sft")
        mine = report.counts.get("sft.train")
        learnt = mine.form if mine else owner.form("sft") if owner and owner.finished("sft") else asked.form
        if learnt != asked.form:
            report.notes.append(
                f"ppo.prompts: {_FORMS[asked.form]}, but the demonstrations that the policy learns from in its SFT stage are "
                f"{_FORMS[learnt]}: it is asked in another form than it was taught (chat_template)"
            )


_FORMS = {"text": "plain text", "chat": "conversations in the chat template", "mixed": "of both forms, text and chat"}


def _encode(report: Report, readers: _Readers, job: Job, wanted: Input, codec: Codec, rows: list[Row]) -> None:
    encoded, counts = readers.encoded(wanted, codec, rows)
    if not counts.kept:
        raise DataError(f"{wanted.data.name}: no row is left: {counts.describe()}")
    job.take(wanted.name, encoded, counts)
    report.counts[wanted.setting] = counts


class _Readers:
    """Codecs, rows and token ids, each made once."""

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

    def rows(self, wanted: Input) -> list[Row]:
        key = wanted.data.model_dump_json(), wanted.kind
        if key not in self._rows:
            self._rows[key] = read_rows(wanted.data, wanted.kind)
        return self._rows[key]

    def encoded(self, wanted: Input, codec: Codec, rows: list[Row]) -> tuple[Any, Counts]:
        encode = wanted.encode
        how = (encode.func, tuple(sorted(encode.keywords.items()))) if isinstance(encode, partial) else (encode,)
        key = id(codec), id(rows), *how
        if key not in self._encoded:
            self._encoded[key] = encode(codec, rows)
        return self._encoded[key]
