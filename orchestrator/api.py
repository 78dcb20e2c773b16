"""The Python driver API: run stages, or start the worker groups for a custom training loop."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict

import psutil
from rich.console import Console

from configs import RunConfig
from orchestrator.algorithms import ALGORITHMS, Algorithm, Callback, Runner
from orchestrator.console import hangup_safe_console, print_run_header
from orchestrator.preflight import Report, run_preflight, with_chosen_dtype
from orchestrator.preflight.settings_checks import check_offload, check_start, settings_checks
from orchestrator.report import write_report
from orchestrator.run import (
    Result,
    Run,
    Stopped,
    StopSignal,
    add_seconds,
    connected,
    count_killed,
    dashboard,
    described,
    session_logs,
)
from orchestrator.run.versions import versions
from orchestrator.worker_groups.failures import WorkerError
from orchestrator.worker_groups.team import Team
from placement import Cluster, make_plan, resolve
from placement.types import Stage
from workers.process.remote_error import summary


def run_stages(config: RunConfig, stages: Sequence[Stage] | None = None, console: Console | None = None) -> Result:
    """Run stages (None: all stages of the config), each from the models of the stages before it. Finished stages are skipped;
    an interrupted stage resumes.

    console: receives the progress; None: standard output.

    Raises ConfigError, PlanError, PreflightError or RunError before anything starts, Stopped if the run was asked to stop,
    WorkerError if a worker failed.
    """
    return resume(Run.begin(config, stages or described(config)), console)


def resume(run: Run, console: Console | None = None, callbacks: Sequence[Callback] = (), export: bool = True) -> Result:
    """Run the unfinished stages of a run. export: whether trained models are written. Errors: see run_stages."""
    console = console or hangup_safe_console()
    if any(not run.finished(stage) for stage in run.stages):
        algorithms, report = checked(run)
        report.raise_if_refused()
        for line in report.lines():
            console.print(line, style="dim", soft_wrap=True)
        console.print(f"checked in {report.seconds:.1f} s; connecting to Ray", style="dim")
        _run(run, [Runner(each, console, callbacks, export) for each in algorithms], report)
    return Result.of(run)


def _run(run: Run, runners: Sequence[Runner], report: Report) -> None:
    stages, console = [runner.name for runner in runners], runners[0].console
    algorithms = [runner.algorithm for runner in runners]
    # In this order: Ray sets signal handlers too.
    with _recorded(run, algorithms), connected(run.config) as cluster, StopSignal(run, console) as stop:
        count_killed(run)
        config, why = with_chosen_dtype(run.config, cluster)
        external_models = run.external_models(stages)
        for line in run.record_resolved(resolve(config, stages, cluster, external_models), why):
            console.print(line, style="dim", soft_wrap=True)
        check_offload(run.config)
        plans = [make_plan(run.config, stage, cluster, external_models) for stage in stages]
        _record_environment(run, cluster)
        _record_data(run, report)
        print_run_header(run, algorithms, plans, console)
        if address := dashboard():
            console.print(address, style="dim", soft_wrap=True, highlight=False)
        for runner, plan in zip(runners, plans, strict=True):
            stop.raise_if_requested(f"before {runner.name}")
            started = time.monotonic()
            try:
                runner.execute(plan, stop)
            except (Stopped, WorkerError):
                raise  # the worker's failure is recorded already
            except Exception as error:
                run.failures.write_exception(error)
                raise
            finally:
                _finish_stage(run, runner.name, time.monotonic() - started, console)


def _finish_stage(run: Run, stage: Stage, seconds: float, console: Console) -> None:
    """Record the stage's time and write the report. An error here is only a warning: the stage is finished without them, and
    must not hide an error that ended it."""
    try:
        add_seconds(run, stage, seconds)
        write_report(run.folder)
    except Stopped:
        raise
    except Exception as error:
        run.failures.write_exception(error)
        console.print(f"warning: report.html was not written: {summary(error)}", markup=False, soft_wrap=True)


@contextmanager
def _recorded(run: Run, algorithms: Sequence[Algorithm]) -> Iterator[None]:
    """Lock the run's folder, then record the settings and the stages in it. Only a lock holder may write there: another process
    may be working in the same folder. Records of finished stages stay."""
    with run.locked():
        run.save({each.name: each.counts[each.learns_from].form for each in algorithms})
        yield


def checked(run: Run) -> tuple[list[Algorithm], Report]:
    """The algorithms of a run's unfinished stages with their data, and the preflight's report. Starts nothing."""
    unfinished = [stage for stage in run.stages if not run.finished(stage)]
    check_start(run, unfinished)  # first: the later checks read these models
    algorithms = [ALGORITHMS[stage](run) for stage in unfinished if run.config.section(stage) is not None]
    return algorithms, run_preflight(run, algorithms, settings_checks(run, unfinished))


@contextmanager
def start_team(config: RunConfig, stage: Stage = "ppo") -> Iterator[Team]:
    """A stage's worker groups on the cluster, without loaded models, for a custom training loop; stopped at the end of the block.

    Raises PlanError if they do not fit on the cluster, PlacementError if they cannot be reserved in time.
    """
    with connected(config) as cluster:
        config = resolve(with_chosen_dtype(config, cluster)[0], [stage], cluster)
        team = Team.start(config, make_plan(config, stage, cluster), say=hangup_safe_console().print)
        try:
            yield team
        finally:
            team.stop()


def _record_data(run: Run, report: Report) -> None:
    """Record in summary.json how many rows of each dataset were used. Records of finished stages stay."""
    summary = run.read("summary.json")
    summary["data"] = summary.get("data", {}) | {setting: asdict(counts) for setting, counts in report.counts.items()}
    run.write("summary.json", summary)


def _record_environment(run: Run, cluster: Cluster) -> None:
    logs = run.folder / "logs"
    logs.unlink(missing_ok=True)
    logs.symlink_to(session_logs())
    summary = run.read("summary.json")
    summary["hardware"] = {
        "cluster": cluster.describe(),
        "driver": f"{platform.machine()}, {psutil.cpu_count()} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB",
    }
    summary["versions"] = versions()
    run.write("summary.json", summary)
