"""The measurements of `troupe bench` as tables."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

GIB = 2**30
PARTS = {"experience": "experience", "learning": "training", "overall": "overall"}


def print_bench(measured: dict[str, Any], console: Console) -> None:
    """Print parameters, time by phase, throughput, TFLOPS by both formulas, and peak memory."""
    benchmark, counted = measured["asked"], measured["counted"]
    console.print(
        f"{benchmark['model']} · {benchmark['strategy']} · {benchmark['precision']} · {benchmark['prompt']} + "
        f"{benchmark['total'] - benchmark['prompt']} tokens · {measured['hardware']['cluster']}",
        style="bold",
    )
    table = _table("", *measured["parameters"])
    table.add_row("parameters", *(f"{n:,}" for n in measured["parameters"].values()))
    console.print(table)
    warm_up = f" after {counted['left_out']} steps of warm-up" if counted["left_out"] else ""
    console.print(f"{counted['samples']} samples in {counted['steps']} steps{warm_up}")
    table = _table("", *measured["seconds"])
    table.add_row("seconds", *(f"{s:.1f}" for s in measured["seconds"].values()))
    console.print(table)
    _print_rates(measured, console)
    _print_memory(measured["peak_bytes"], console)


def _print_rates(measured: dict[str, Any], console: Console) -> None:
    table = _table("", *PARTS.values())
    table.add_row("samples/s", *(f"{measured['samples_per_second'][part]:.3f}" for part in PARTS))
    for kind, label in {"original": "TFLOPS, original formula", "cached": "TFLOPS, cached generation"}.items():
        table.add_row(label, *(f"{measured['tflops'][kind][part]:.4f}" for part in PARTS))
    console.print(table)
    console.print(
        "The original formula assumes generation without a key-value cache. At these lengths it counts "
        f"{measured['generation_counted_over']:.0f} times the operations of generation, and "
        f"{measured['experience_counted_over']:.1f} times those of experience.",
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
    console.print(f"peak of all processes in each phase, GiB: {phases}", style="dim")


def _table(*headers: str) -> Table:
    table = Table(box=box.SIMPLE)
    for i, header in enumerate(headers):
        table.add_column(header, justify="right" if i else "left")
    return table


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}"
