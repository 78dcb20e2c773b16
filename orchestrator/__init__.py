"""The driver: what happens, and when. The names below are the Python API; each is imported when it is first used."""

import warnings
from typing import TYPE_CHECKING, Any

from troupe.imports import lazy  # before any other import of ours

if TYPE_CHECKING:
    from configs import ConfigError, RunConfig, load_config
    from orchestrator.api import run_stages, start_team
    from orchestrator.evaluation.evaluate import evaluate
    from orchestrator.run import Result, RunError, Stopped
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

_attribute = lazy(
    __name__,
    {
        "configs": ("ConfigError", "RunConfig", "load_config"),
        "orchestrator.api": ("run_stages", "start_team"),
        "orchestrator.evaluation.evaluate": ("evaluate",),
        "orchestrator.run": ("Result", "RunError", "Stopped"),
        "orchestrator.worker_groups.calls": ("run_concurrently",),
        "orchestrator.worker_groups.failures": ("WorkerError",),
        "orchestrator.worker_groups.rollouts": ("Experience", "Rollouts"),
        "orchestrator.worker_groups.team": ("Team",),
        "workers.data": ("read_rows",),
        "workers.data.step_inputs": ("KLTerm",),
    },
)

_RENAMED = {"together": "run_concurrently"}
"""Old name -> new name; the old names go with the next release."""


def __getattr__(name: str) -> Any:
    if name in _RENAMED:
        warnings.warn(f"orchestrator.{name} is now orchestrator.{_RENAMED[name]}", DeprecationWarning, stacklevel=2)
    return _attribute(_RENAMED.get(name, name))
