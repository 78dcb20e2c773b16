"""Troupe's public face: what programs and plugins use, under one name. Importing it imports nothing heavy.

    import troupe

    config = troupe.load_config("configs/movies/tiny.yaml", ["name=mine"])
    result = troupe.run_stages(config)

docs/driver.md and docs/algorithms.md show how the names are used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from troupe.imports import lazy

if TYPE_CHECKING:
    from configs import ConfigError, RunConfig, load_config
    from configs.schema import AnswerAdvantageSettings, BatchSettings, Settings
    from orchestrator import (
        Experience,
        KLTerm,
        Result,
        Rollouts,
        RunError,
        Stopped,
        Team,
        WorkerError,
        evaluate,
        read_rows,
        run_concurrently,
        run_stages,
        start_team,
    )
    from orchestrator.algorithms import Algorithm, Supervised
    from orchestrator.algorithms.credit import AnswerAdvantage, AnswerScores, group_mean, group_std
    from orchestrator.loggers.base import LoggedStage, Logger
    from placement.stages import StageSpec
    from workers.api import remote, request
    from workers.rl.advantages import TokenAdvantage, masked
    from workers.rl.losses import LossInputs, LossOutput, PolicyLoss

_MODULES = {
    "configs": ("ConfigError", "RunConfig", "load_config"),
    "configs.schema": ("AnswerAdvantageSettings", "BatchSettings", "Settings"),
    "orchestrator": (
        "Experience",
        "KLTerm",
        "Result",
        "Rollouts",
        "RunError",
        "Stopped",
        "Team",
        "WorkerError",
        "evaluate",
        "read_rows",
        "run_concurrently",
        "run_stages",
        "start_team",
    ),
    "orchestrator.algorithms": ("Algorithm", "Supervised"),
    "orchestrator.algorithms.credit": ("AnswerAdvantage", "AnswerScores", "group_mean", "group_std"),
    "orchestrator.loggers.base": ("LoggedStage", "Logger"),
    "placement.stages": ("StageSpec",),
    "workers.api": ("remote", "request"),
    "workers.rl.advantages": ("TokenAdvantage", "masked"),
    "workers.rl.losses": ("LossInputs", "LossOutput", "PolicyLoss"),
}

__all__ = [
    "Algorithm",
    "AnswerAdvantage",
    "AnswerAdvantageSettings",
    "AnswerScores",
    "BatchSettings",
    "ConfigError",
    "Experience",
    "KLTerm",
    "LoggedStage",
    "Logger",
    "LossInputs",
    "LossOutput",
    "PolicyLoss",
    "Result",
    "Rollouts",
    "RunConfig",
    "RunError",
    "Settings",
    "StageSpec",
    "Stopped",
    "Supervised",
    "Team",
    "TokenAdvantage",
    "WorkerError",
    "evaluate",
    "group_mean",
    "group_std",
    "load_config",
    "masked",
    "read_rows",
    "remote",
    "request",
    "run_concurrently",
    "run_stages",
    "start_team",
]

__getattr__ = lazy(__name__, _MODULES)


def __dir__() -> list[str]:
    return __all__
