"""The report of a run: report.html, its charts and the files that they are made from."""

from typing import TYPE_CHECKING

from troupe.imports import lazy

if TYPE_CHECKING:
    from orchestrator.report.memory_chart import draw_memory
    from orchestrator.report.report import write_report

__all__ = ["draw_memory", "write_report"]

__getattr__ = lazy(
    __name__,
    {
        "orchestrator.report.memory_chart": ("draw_memory",),
        "orchestrator.report.report": ("write_report",),
    },
)
