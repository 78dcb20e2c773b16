"""The Python driver API: run stages, or start the worker groups and write a loop of one's own."""

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
from orchestrator.console.run_header import print_opening
from orchestrator.console.terminal import lasting_console
from orchestrator.preflight.auto_dtype import with_chosen_dtype
from orchestrator.preflight.preflight import Report, preflight
from orchestrator.preflight.settings_checks import check_offload, check_start, settings_checks
from orchestrator.report.report import write_report
from orchestrator.run.ray_cluster import connected, dashboard, session_logs
from orchestrator.run.result import Result
from orchestrator.run.run_dir import Run, described
from orchestrator.run.sessions import add_seconds, count_killed
from orchestrator.run.stop_signal import Stopped, StopSignal
from orchestrator.run.versions import versions
from orchestrator.worker_groups.failures import WorkerError
from orchestrator.worker_groups.team import Team
from placement import Cluster, make_plan, resolve
from placement.types import Stage
from workers.process.remote_error import summary


def run_stages(config: RunConfig, stages: Sequence[Stage] | None = None, console: Console | None = None) -> Result:
    """Run stages (none named: all that the config describes), each from the models of those before. What is finished is not
    run again, what was cut short goes on.

    console: where progress goes; none: standard output.

    Raises ConfigError, PlanError, PreflightError or RunError before anything starts, Stopped where the run was asked to
    stop, WorkerError where a worker failed.
    """
    return go_on(Run.begin(config, stages or described(config)), console)


def go_on(run: Run, console: Console | None = None, callbacks: Sequence[Callback] = (), export: bool = True) -> Result:
    """Run what is left of a run. export: whether trained models are written. Errors: see run_stages."""
    console = console or lasting_console()
    left = [stage for stage in run.stages if not run.finished(stage)]
    if left:
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
    with _at_work(run, algorithms), connected(run.config) as cluster, StopSignal(run, console) as stop:
        count_killed(run)
        config, why = with_chosen_dtype(run.config, cluster)
        taken = run.taken(stages)
        for words in run.choose(resolve(config, stages, cluster, taken), why):
            console.print(words, style="dim", soft_wrap=True)
        check_offload(run.config)
        plans = [make_plan(run.config, stage, cluster, taken) for stage in stages]
        _note_surroundings(run, cluster)
        _note_data(run, report)
        print_opening(run, algorithms, plans, console)
        if entrance := dashboard():
            console.print(entrance, style="dim", soft_wrap=True, highlight=False)
        for runner, plan in zip(runners, plans, strict=True):
            stop.raise_if_requested(f"before {runner.name}")
            started = time.monotonic()
            try:
                runner.execute(plan, stop)
            except (Stopped, WorkerError):
                raise  # of the second there is a record already
            except Exception as error:
                run.failures.write_exception(error)
                raise
            finally:
                _show(run, runner.name, time.monotonic() - started, console)


def _show(run: Run, stage: Stage, seconds: float, console: Console) -> None:
    """The report, and the stage's time in it. A stage is as finished without them, and an error that ended it says more."""
    try:
        add_seconds(run, stage, seconds)
        write_report(run.folder)
    except Stopped:
        raise
    except Exception as error:
        run.failures.write_exception(error)
        console.print(f"warning: report.html was not written: {summary(error)}", markup=False, soft_wrap=True)


@contextmanager
def _at_work(run: Run, algorithms: Sequence[Algorithm]) -> Iterator[None]:
    """The run's folder locked, and what is about to be run noted in it: not before, or the notes of a process that is at work
    there would be overwritten. What is finished stays noted as it was run."""
    with run.locked():
        run.keep({each.name: each.counts[each.learns_from].form for each in algorithms})
        yield


def checked(run: Run) -> tuple[list[Algorithm], Report]:
    """What is left of a run, with its data, and what the preflight found of it. Starts nothing."""
    left = [stage for stage in run.stages if not run.finished(stage)]
    check_start(run, left)  # the models that the others look at
    algorithms = [ALGORITHMS[stage](run) for stage in left if run.config.section(stage) is not None]
    return algorithms, preflight(run, algorithms, settings_checks(run, left))


@contextmanager
def start_team(config: RunConfig, stage: Stage = "ppo") -> Iterator[Team]:
    """A stage's worker groups on the cluster, nothing loaded yet, for a loop of one's own; ended when the block ends.

    Raises PlanError where they do not fit, PlacementError where they cannot be had in time.
    """
    with connected(config) as cluster:
        config = resolve(with_chosen_dtype(config, cluster)[0], [stage], cluster)
        team = Team.start(config, make_plan(config, stage, cluster), say=lasting_console().print)
        try:
            yield team
        finally:
            team.stop()


def _note_data(run: Run, report: Report) -> None:
    """What became of the rows of each dataset, by its setting; of finished stages what was noted stays."""
    summary = run.read("summary.json")
    summary["data"] = summary.get("data", {}) | {setting: asdict(counts) for setting, counts in report.counts.items()}
    run.write("summary.json", summary)


def _note_surroundings(run: Run, cluster: Cluster) -> None:
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
