"""A run: its folder, settings, state and status; the Ray cluster that it runs on; signals that ask it to stop."""

from typing import TYPE_CHECKING

from troupe.imports import lazy

if TYPE_CHECKING:
    from orchestrator.run.condition import Condition
    from orchestrator.run.ray_cluster import (
        address_of,
        connected,
        dashboard,
        foreseen_cluster,
        local_cluster,
        session_logs,
    )
    from orchestrator.run.result import Result
    from orchestrator.run.run_dir import Run, RunError, described, in_copy, local
    from orchestrator.run.sessions import add_seconds, count_killed, stage_seconds
    from orchestrator.run.status import Status
    from orchestrator.run.stop_signal import Stopped, StopSignal

__all__ = [
    "Condition",
    "Result",
    "Run",
    "RunError",
    "Status",
    "StopSignal",
    "Stopped",
    "add_seconds",
    "address_of",
    "connected",
    "count_killed",
    "dashboard",
    "described",
    "foreseen_cluster",
    "in_copy",
    "local",
    "local_cluster",
    "session_logs",
    "stage_seconds",
]

__getattr__ = lazy(
    __name__,
    {
        "orchestrator.run.condition": ("Condition",),
        "orchestrator.run.ray_cluster": (
            "address_of",
            "connected",
            "dashboard",
            "foreseen_cluster",
            "local_cluster",
            "session_logs",
        ),
        "orchestrator.run.result": ("Result",),
        "orchestrator.run.run_dir": ("Run", "RunError", "described", "in_copy", "local"),
        "orchestrator.run.sessions": ("add_seconds", "count_killed", "stage_seconds"),
        "orchestrator.run.status": ("Status",),
        "orchestrator.run.stop_signal": ("Stopped", "StopSignal"),
    },
)
