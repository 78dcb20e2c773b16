"""What a finished run says in the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from orchestrator.api import Result


def print_result(result: Result, console: Console) -> None:
    """The numbers of each stage, and where the models and the report are."""
    table = Table("stage", "result", "model", box=None, header_style="bold", pad_edge=False)
    for stage, model in result.models.items():
        numbers = result.numbers.get(stage, {})
        shown = ", ".join(f"{name} {value:,.4g}" for name, value in numbers.items())
        table.add_row(stage, shown, str(model))
    console.print(table)
    console.print(f"report: {result.report.absolute()}", soft_wrap=True)
