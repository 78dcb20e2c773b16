"""What `troupe bench` measured, as tables."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

GIB = 2**30
PARTS = {"experience": "making experience", "learning": "learning", "overall": "overall"}


def print_bench(measured: dict[str, Any], console: Console) -> None:
    """Parameters, time by phase, throughput, TFLOPS by both formulas, peak memory."""
    asked, counted = measured["asked"], measured["counted"]
    console.print(
        f"{asked['model']} · {asked['strategy']} · {asked['precision']} · {asked['prompt']} + "
        f"{asked['total'] - asked['prompt']} tokens · {measured['hardware']['cluster']}",
        style="bold",
    )
    table = _table("", *measured["parameters"])
    table.add_row("parameters", *(f"{n:,}" for n in measured["parameters"].values()))
    console.print(table)
    left_out = f"; {counted['left_out']} before them left out" if counted["left_out"] else ""
    console.print(f"{counted['samples']} samples in {counted['steps']} steps{left_out}")
    table = _table("", *measured["seconds"])
    table.add_row("seconds", *(f"{s:.1f}" for s in measured["seconds"].values()))
    console.print(table)
    _print_rates(measured, console)
    _print_memory(measured["peak_bytes"], console)


def _print_rates(measured: dict[str, Any], console: Console) -> None:
    table = _table("", *PARTS.values())
    table.add_row("samples/s", *(f"{measured['samples_per_second'][part]:.3f}" for part in PARTS))
    for kind, label in {"original": "TFLOPS, as the original counted", "cached": "TFLOPS, cached generation"}.items():
        table.add_row(label, *(f"{measured['tflops'][kind][part]:.4f}" for part in PARTS))
    console.print(table)
    console.print(
        "The original's formula takes generation to have no key-value cache. At these lengths it counts "
        f"{measured['generation_counted_over']:.0f} times the operations of generation, and "
        f"{measured['experience_counted_over']:.1f} times those of making experience.",
        style="dim",
    )


def _print_memory(peak: dict[str, Any], console: Console) -> None:
    roles = peak["roles"]
    table = _table("peak memory, GiB", *roles, "whole job")
    table.add_row("host", *(_gib(size) for size in roles.values()), _gib(peak["total"]))
    if peak["devices"]:
        table.add_row(
            "GPUs", *(_gib(peak["devices"].get(role, 0)) for role in roles), _gib(sum(peak["devices"].values()))
        )
    console.print(table)
    phases = ", ".join(f"{phase} {_gib(sizes['total'])}" for phase, sizes in peak["phases"].items())
    console.print(f"all processes at the highest moment of each phase, GiB: {phases}", style="dim")


def _table(*headers: str) -> Table:
    table = Table(box=box.SIMPLE)
    for i, header in enumerate(headers):
        table.add_column(header, justify="right" if i else "left")
    return table


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}"
