"""What `troupe plan` plans: a run's settings or, without any, the benchmark's with a model that is named."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import typer

from configs import RunConfig, load_config
from orchestrator.run.run_dir import Run, described
from placement import Cluster, PlanReport, auto_roles, make_plan, resolve, with_memory
from placement.memory import default_settings_for
from placement.plan import auto_dtype_settings, predicted_dtype, with_dtype


def cluster_of(text: str | None) -> Cluster:
    """The cluster that is described, or this machine. Raises BadParameter where the text cannot be read."""
    try:
        return Cluster.parse(text) if text else Cluster.this_machine()
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--cluster") from None


def asked_for(path: Path | None, model: str | None, overrides: Sequence[str], cluster: Cluster) -> RunConfig:
    """The settings in a file, or those that a model's name stands for. With a name there is no file: what stands in its place
    is an override too.

    Raises ConfigError, or BadParameter where neither is given or the model is not known.
    """
    if model is None:
        if path is None:
            raise typer.BadParameter("a file with settings, or --model, is needed", param_hint="CONFIG")
        return load_config(path, overrides)
    try:
        supposed = default_settings_for(os.path.expanduser(model), cluster)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--model") from None
    return load_config(supposed, [*([str(path)] if path else []), *overrides])


def planned(config: RunConfig, cluster: Cluster) -> tuple[list[PlanReport], list[str]]:
    """The plan of each stage with its memory, and what each `auto` becomes. Raises PlanError, or RunError where `start_from`
    names no run that has what the stages need."""
    stages = described(config)
    run = Run(config, Path(config.runs) / config.name)
    run.stages = stages  # as if it were new
    taken = run.taken(stages)
    settings = resolve(with_dtype(config, predicted_dtype(config, cluster)), stages, cluster, taken)
    plans = [with_memory(settings, make_plan(settings, stage, cluster, taken), taken) for stage in stages]
    roles = [role for role in auto_roles(config) if any(role in report.plan.roles for report in plans)]
    words = [f"strategy: auto is {settings.strategy_of(role)} for the {role}" for role in roles]
    if auto_dtype_settings(config):
        words.append(f"model.dtype: auto is taken to be {settings.model.dtype}")
    return plans, words
