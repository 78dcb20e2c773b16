"""A chart of predicted memory: for each place (host, GPU, disk) a bar per phase, stacked by kind, and the place's size."""

from __future__ import annotations

from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from textwrap import wrap

import typer
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from orchestrator.report.charts import GRID, INK, MUTED, SERIES, STYLE, WARN
from placement import PlanReport
from placement.memory import MemoryEstimate, Place
from placement.types import GIB

COLORS = (*SERIES, "#84cc16", "#94a3b8")


def draw_memory(reports: Sequence[PlanReport], file: Path) -> None:
    """Write the chart to a .svg, .png or .html. Raises BadParameter if the plans have no predicted memory."""
    panels = [
        (f"{report.plan.stage}: {place.name.replace('+', ' + ')}", place)
        for report in reports
        if isinstance(report.memory, MemoryEstimate)
        for place in report.memory.places
    ]
    if not panels:
        raise typer.BadParameter(f"no predicted memory: {reports[0].memory}", param_hint="--picture")
    with rc_context(STYLE):
        columns = min(3, len(panels))
        rows = -(-len(panels) // columns)
        figure = Figure(figsize=(4.2 * columns, 3.2 * rows + 0.5), layout="constrained")
        for axes, (title, place) in zip(figure.subplots(rows, columns, squeeze=False).flat, panels, strict=False):
            _bars(axes, title, place)
        for axes in figure.axes[len(panels) :]:
            axes.set_axis_off()
        legend = dict(zip(*figure.axes[0].get_legend_handles_labels()[::-1], strict=True))
        figure.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=5)
        _save(figure, file)


def _bars(axes: Axes, title: str, place: Place) -> None:
    """A bar for each phase of a place, and a line at its size if the size is known."""
    phases = list(place.parts)
    bottom = [0.0] * len(phases)
    for color, part in zip(COLORS, next(iter(place.parts.values())).parts(), strict=True):
        heights = [place.parts[phase].parts()[part] / GIB for phase in phases]
        axes.bar(phases, heights, 0.8, bottom=bottom, color=color, label=part.replace("_", " "), linewidth=0)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    if place.size is not None:
        axes.axhline(place.size / GIB, color=WARN, linewidth=1.2, linestyle=(0, (4, 3)))
        axes.text(len(phases) - 0.55, place.size / GIB, "size", color=WARN, va="bottom", ha="right", fontsize=9)
    axes.set_title("\n".join(wrap(title, 38)), loc="left", fontsize=10, color=INK)
    axes.set_ylabel("GiB", fontsize=9, color=MUTED)
    axes.grid(axis="x", visible=False)
    axes.tick_params(axis="x", labelsize=8)
    axes.margins(y=0.12)
    axes.spines["bottom"].set_color(GRID)


def _save(figure: Figure, file: Path) -> None:
    if file.suffix != ".html":
        figure.savefig(file, dpi=150, facecolor="white", metadata={"Date": None} if file.suffix == ".svg" else None)
        return
    buffer = StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    page = f"<!doctype html><meta charset=utf-8><title>Predicted memory</title>{svg[svg.index('<svg') :]}"
    file.write_text(page, encoding="utf-8")
