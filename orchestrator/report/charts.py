"""The report's charts: each turns metrics into an inline SVG."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from io import StringIO
from statistics import fmean
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from orchestrator.evaluation import Interval

BEFORE, AFTER = "#94a3b8", "#2563eb"
INK, MUTED, GRID, WARN = "#0f172a", "#64748b", "#e2e8f0", "#dc2626"
SERIES = ("#2563eb", "#f59e0b", "#10b981", "#a855f7", "#ef4444", "#14b8a6", "#64748b")
STACK = (*SERIES, "#84cc16")

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # Text, not glyph outlines: smaller, and in the page's font.
    "text.parse_math": False,  # A reward source may be named "$x$".
    "font.size": 10,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "legend.labelcolor": INK,
    "lines.solid_capstyle": "round",
}


@dataclass(frozen=True)
class Chart:
    """A chart of the report."""

    title: str
    caption: str
    svg: str
    narrow: str = ""
    """The same chart at half the width, for narrow screens; empty if the chart is not wide."""


@dataclass(frozen=True)
class Series:
    """One metric over steps. `low` and `high` draw a band, or error bars where `points` is set."""

    label: str
    steps: Sequence[int]
    values: Sequence[float]
    color: str = SERIES[0]
    low: Sequence[float] = field(default=())
    high: Sequence[float] = field(default=())
    points: bool = False


def curves(
    title: str,
    caption: str,
    series: Sequence[Series],
    *,
    line: tuple[float, str] | None = None,
    log: bool = False,
    percent: bool = False,
    wide: bool = False,
) -> Chart:
    """Metrics over steps. With many steps: the values as a thin line, their moving mean as a bold line.

    Args:
        line: A level to compare with, and its label.
        log: Logarithmic axis.
        percent: Values are shares.
        wide: Double width.
    """

    def draw(axes: Axes, columns: int) -> None:
        for curve in series:
            _draw(axes, curve)
        if line is not None:
            axes.axhline(line[0], color=WARN, linewidth=1.1, linestyle=(0, (4, 3)), label=line[1])
        if log:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0e}")
            axes.tick_params(which="minor", left=False)
        if percent:
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        if len(series) + (line is not None) > 1:
            _legend(axes, columns)
        _step_axis(axes)

    return _chart(title, caption, draw, wide)


MAX_COLUMNS = 80
"""Most columns of a stacked chart."""


def steps_per_column(steps: int) -> int:
    """Number of steps that one column of a stacked chart averages."""
    return -(-steps // MAX_COLUMNS)


def stacked(title: str, caption: str, steps: Sequence[int], parts: Mapping[str, Sequence[float]]) -> Chart:
    """Stacked parts of a total over steps. With many steps, each column is the mean of several."""
    per_column = steps_per_column(len(steps))
    starts = range(0, len(steps), per_column)
    centers = [fmean(steps[start : start + per_column]) for start in starts]
    width = 0.86 * per_column

    def draw(axes: Axes, columns: int) -> None:
        bottom = np.zeros(len(centers))
        for color, (label, values) in zip(STACK * len(parts), parts.items(), strict=False):
            heights = np.asarray([fmean(values[start : start + per_column]) for start in starts])
            axes.bar(centers, heights, width, bottom=bottom, color=color, label=_label(label), linewidth=0)
            bottom += heights
        axes.set_ylabel("seconds", fontsize=9)
        _step_axis(axes)
        _legend(axes, columns)

    return _chart(title, caption, draw, wide=True)


def distributions(
    title: str, caption: str, before: Sequence[float], after: Sequence[float], names: tuple[str, str]
) -> Chart:
    """Histograms of a score before and after; a dashed line marks each mean."""
    low, high = np.percentile([*before, *after], [0.5, 99.5])
    edges = np.linspace(low, high, 33) if high > low else np.linspace(low - 0.5, low + 0.5, 33)

    def draw(axes: Axes, columns: int) -> None:
        for values, color, name in ((before, BEFORE, names[0]), (after, AFTER, names[1])):
            clipped = np.clip(values, edges[0], edges[-1])
            axes.hist(clipped, bins=list(edges), color=color, alpha=0.55, label=name, linewidth=0)
            axes.axvline(float(np.mean(values)), color=color, linewidth=1.8, linestyle=(0, (3, 2)))
        axes.set_ylabel("responses", fontsize=9)
        axes.yaxis.set_major_locator(MaxNLocator("auto", integer=True))
        axes.set_xlabel("reward", loc="right", fontsize=9)
        axes.grid(axis="x", visible=False)
        _legend(axes, columns)

    return _chart(title, caption, draw, wide=True)


def effects(title: str, caption: str, changes: Mapping[str, Interval]) -> Chart:
    """Standardized changes with their intervals, one row each, and a line at 0."""
    rows = list(changes.items())[::-1]

    def draw(axes: Axes, columns: int) -> None:
        axes.axvline(0, color=MUTED, linewidth=1)
        for row, (_, change) in enumerate(rows):
            axes.plot([change.low, change.high], [row, row], color=AFTER, linewidth=2)
            axes.plot(change.mean, row, "o", color=AFTER, markersize=7, markeredgecolor="white")
        axes.set_yticks(range(len(rows)), [name for name, _ in rows], color=INK)
        axes.set_ylim(-0.7, len(rows) - 0.3)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("standard deviations", loc="right", fontsize=9)

    return _chart(title, caption, draw)


def _draw(axes: Axes, series: Series) -> None:
    steps, values = np.asarray(series.steps), np.asarray(series.values, float)
    label = _label(series.label)
    if series.points:
        if len(series.low):
            error = np.abs(np.asarray([series.low, series.high], float) - values)
            axes.errorbar(steps, values, error, fmt="none", ecolor=series.color, elinewidth=1.4, capsize=3, zorder=4)
        axes.plot(steps, values, "o", color=series.color, markersize=5, markeredgecolor="white", label=label, zorder=5)
        return
    window = moving_window(len(values))
    if window > 1:
        axes.plot(steps, values, color=series.color, linewidth=0.7, alpha=0.35)
    if len(series.low):
        low, high = _moving_mean(series.low, window), _moving_mean(series.high, window)
        axes.fill_between(steps, low, high, color=series.color, alpha=0.12, linewidth=0)
    axes.plot(steps, _moving_mean(values, window), color=series.color, linewidth=2.0, label=label)


def moving_window(count: int) -> int:
    """Number of steps in the moving mean, odd: about 1/25 of the curve; 1 (no smoothing) below 40 steps."""
    return 1 if count < 40 else count // 25 // 2 * 2 + 1


def _moving_mean(values: Sequence[float] | np.ndarray, window: int) -> np.ndarray:
    """Mean of the window around each value; at the ends, of the part of the window that has values."""
    ones = np.ones(window)
    total = np.convolve(np.asarray(values, float), ones, mode="same")
    return total / np.convolve(np.ones(len(values)), ones, mode="same")


def _step_axis(axes: Axes) -> None:
    axes.set_xlabel("step", loc="right", fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10]))
    axes.margins(x=0.01)


def _label(text: str) -> str:
    """The text for a legend: matplotlib omits labels that begin with an underscore."""
    return text.replace("_", " ").strip() or text


def _legend(axes: Axes, columns: int) -> None:
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(-0.01, 1.0),
        ncols=columns,
        borderaxespad=0.1,
        columnspacing=1.4,
        handlelength=1.4,
    )


def _chart(title: str, caption: str, draw: Callable[[Axes, int], None], wide: bool = False) -> Chart:
    """draw: takes the axes and the most columns of a legend."""
    sizes = ((8.2, 8), (4.0, 3)) if wide else ((4.0, 3),)
    return Chart(title, caption, *(_svg(width, columns, draw) for width, columns in sizes))


def _svg(width: float, columns: int, draw: Callable[[Axes, int], None]) -> str:
    """The SVG element of a figure. width: inches. columns: most columns of the legend."""
    buffer = StringIO()
    with rc_context({**STYLE, "svg.hashsalt": "troupe"}):
        figure = Figure(figsize=(width, 2.4), layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure.add_subplot(), columns)
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=metadata)
    return _inline(buffer.getvalue())


def _inline(svg: str) -> str:
    """Only the <svg> element: without size and style, which the page sets, and with ids that no other chart has."""
    prefix = f"c{zlib.crc32(svg.encode()):08x}-"
    head, rest = svg[svg.index("<svg") :].split(">", 1)
    head = re.sub(r' (width|height)="[\d.]+pt"', "", head)
    rest = re.sub(r"<style.*?</style>", "", rest, count=1, flags=re.DOTALL)
    rest = re.sub(r'<g id="[^"]*"', "<g", rest)
    rest = re.sub(r'\bid="', f'id="{prefix}', rest)
    rest = re.sub(r'(url\(#|href="#)', rf"\1{prefix}", rest)
    return f"{head}>{rest}"
