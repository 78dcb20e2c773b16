"""Checks before a run starts: settings, models, data and plans."""

from typing import TYPE_CHECKING

from troupe.imports import lazy

if TYPE_CHECKING:
    from orchestrator.preflight.auto_dtype import with_chosen_dtype
    from orchestrator.preflight.model_checks import Head, ModelUse
    from orchestrator.preflight.preflight import Input, Job, PreflightError, Problem, Report, run_preflight
    from orchestrator.preflight.settings_checks import Check, check_offload, check_start, column_checks

__all__ = [
    "Check",
    "Head",
    "Input",
    "Job",
    "ModelUse",
    "PreflightError",
    "Problem",
    "Report",
    "check_offload",
    "check_start",
    "column_checks",
    "run_preflight",
    "with_chosen_dtype",
]

__getattr__ = lazy(
    __name__,
    {
        "orchestrator.preflight.auto_dtype": ("with_chosen_dtype",),
        "orchestrator.preflight.model_checks": ("Head", "ModelUse"),
        "orchestrator.preflight.preflight": ("Input", "Job", "PreflightError", "Problem", "Report", "run_preflight"),
        "orchestrator.preflight.settings_checks": ("Check", "check_offload", "check_start", "column_checks"),
    },
)
