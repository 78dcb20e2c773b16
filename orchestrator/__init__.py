"""The driver: what happens, and when. The names below are the Python API; each is imported when it is first used."""

import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

import troupe.imports  # noqa: F401  before any other import of ours

if TYPE_CHECKING:
    from configs import ConfigError, RunConfig, load_config
    from orchestrator.api import run_stages, start_team
    from orchestrator.evaluation.evaluate import evaluate
    from orchestrator.run.result import Result
    from orchestrator.run.run_dir import RunError
    from orchestrator.run.stop_signal import Stopped
    from orchestrator.worker_groups.calls import run_concurrently
    from orchestrator.worker_groups.failures import WorkerError
    from orchestrator.worker_groups.rollouts import Experience, Rollouts
    from orchestrator.worker_groups.team import Team
    from workers.data import read_rows
    from workers.data.step_inputs import KLTerm

__all__ = [
    "ConfigError",
    "Experience",
    "KLTerm",
    "Result",
    "Rollouts",
    "RunConfig",
    "RunError",
    "Stopped",
    "Team",
    "WorkerError",
    "evaluate",
    "load_config",
    "read_rows",
    "run_concurrently",
    "run_stages",
    "start_team",
]

_HOMES = {
    "configs": ("ConfigError", "RunConfig", "load_config"),
    "orchestrator.api": ("run_stages", "start_team"),
    "orchestrator.worker_groups.calls": ("run_concurrently",),
    "orchestrator.evaluation.evaluate": ("evaluate",),
    "orchestrator.worker_groups.failures": ("WorkerError",),
    "orchestrator.run.result": ("Result",),
    "orchestrator.worker_groups.rollouts": ("Experience", "Rollouts"),
    "orchestrator.run.run_dir": ("RunError",),
    "orchestrator.run.stop_signal": ("Stopped",),
    "orchestrator.worker_groups.team": ("Team",),
    "workers.data": ("read_rows",),
    "workers.data.step_inputs": ("KLTerm",),
}


_RENAMED = {"together": "run_concurrently"}
"""Old name -> new one; the old ones go with the next release."""


def __getattr__(name: str) -> Any:
    if name in _RENAMED:
        warnings.warn(f"orchestrator.{name} is now orchestrator.{_RENAMED[name]}", DeprecationWarning, stacklevel=2)
        name = _RENAMED[name]
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
