"""What the commands print."""

from typing import TYPE_CHECKING

from troupe.imports import lazy

if TYPE_CHECKING:
    from orchestrator.console.listing import print_runs
    from orchestrator.console.plan_command import load_settings, parse_cluster, plan_stages
    from orchestrator.console.run_header import print_run_header
    from orchestrator.console.run_summary import print_result
    from orchestrator.console.status_text import print_status
    from orchestrator.console.terminal import hangup_safe_console, make_output_hangup_safe

__all__ = [
    "hangup_safe_console",
    "load_settings",
    "make_output_hangup_safe",
    "parse_cluster",
    "plan_stages",
    "print_result",
    "print_run_header",
    "print_runs",
    "print_status",
]

__getattr__ = lazy(
    __name__,
    {
        "orchestrator.console.listing": ("print_runs",),
        "orchestrator.console.plan_command": ("load_settings", "parse_cluster", "plan_stages"),
        "orchestrator.console.run_header": ("print_run_header",),
        "orchestrator.console.run_summary": ("print_result",),
        "orchestrator.console.status_text": ("print_status",),
        "orchestrator.console.terminal": ("hangup_safe_console", "make_output_hangup_safe"),
    },
)
