"""`troupe plan`: plans for a run's settings, or for the benchmark's settings with a named model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import typer

from configs import RunConfig, load_config
from orchestrator.run import Run, described
from placement import Cluster, PlanReport, auto_roles, make_plan, resolve, with_memory
from placement.memory import default_settings_for
from placement.plan import auto_dtype_settings, predicted_dtype, with_dtype


def parse_cluster(text: str | None) -> Cluster:
    """The cluster that the text describes; None: this machine. Raises BadParameter if the text is not valid."""
    try:
        return Cluster.parse(text) if text else Cluster.this_machine()
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--cluster") from None


def load_settings(path: Path | None, model: str | None, overrides: Sequence[str], cluster: Cluster) -> RunConfig:
    """The settings of a file, or the default settings for a model. With a model there is no file: `path` is then the first
    override.

    Raises ConfigError, or BadParameter if neither is given or the model is not known.
    """
    if model is None:
        if path is None:
            raise typer.BadParameter("needs a file with settings, or --model", param_hint="CONFIG")
        return load_config(path, overrides)
    try:
        defaults = default_settings_for(os.path.expanduser(model), cluster)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--model") from None
    return load_config(defaults, [*([str(path)] if path else []), *overrides])


def plan_stages(config: RunConfig, cluster: Cluster) -> tuple[list[PlanReport], list[str]]:
    """The plan of each stage with its predicted memory, and a line for each resolved `auto`. Raises PlanError, or RunError if the
    run of `start_from` lacks a model that the stages need."""
    stages = described(config)
    run = Run(config, Path(config.runs) / config.name)
    run.stages = stages  # as in a new run
    external_models = run.external_models(stages)
    settings = resolve(with_dtype(config, predicted_dtype(config, cluster)), stages, cluster, external_models)
    plans = [
        with_memory(settings, make_plan(settings, stage, cluster, external_models), external_models) for stage in stages
    ]
    roles = [role for role in auto_roles(config) if any(role in report.plan.roles for report in plans)]
    lines = [f"strategy: auto is {settings.strategy_of(role)} for the {role}" for role in roles]
    if auto_dtype_settings(config):
        lines.append(f"model.dtype: auto is assumed to be {settings.model.dtype}")
    return plans, lines
