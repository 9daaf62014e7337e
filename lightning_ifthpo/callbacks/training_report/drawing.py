"""Line charts as SVG that takes its colours from the page; needs matplotlib."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Sequence
from html import escape
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from lightning_ifthpo.callbacks.training_report.chart import Chart, Line
from lightning_ifthpo.callbacks.training_report.records import Series

_SIZE = (4.4, 2.7)  # inches: drawn at its own size on a desk, and slightly smaller on a phone 390 pixels wide
_ROW = 0.085  # height of a row of the legend, as a share of the chart
_INK = "#010203"  # stands for the colour of text, and is replaced
_LINES = tuple(f"#0a0b{number:02x}" for number in range(8))  # stand for the colours of lines
_DASHES = ("-", "--", "-.", ":")  # lines can be told apart without colours
_MANY = 60  # points that are drawn as dots, and hyper steps that are marked
_LARGEST = 1e100  # matplotlib overflows where values are near the largest float; tiny ones count as zero
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "lightning_ifthpo",
    "text.parse_math": False,
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.grid": True,
    "grid.color": _INK,
    "grid.alpha": 0.15,
    "lines.linewidth": 1.4,
    "path.simplify": True,
}


def draw(chart: Chart, name: str) -> str:
    """Returns the chart as an `svg` element. Cost: some 50 ms.

    Args:
        chart: What to draw.
        name: Prefix of all ids, unique in a page.
    """
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=_SIZE)  # fixed margins, because a layout engine doubles the time
        FigureCanvasSVG(figure)
        axes = figure.add_axes((0.15, 0.17, 0.82, 0.8 - _ROW * _legend_rows(chart)))
        for index, line in enumerate(line for line in chart.lines if len(line.series)):
            _draw_line(axes, line, index)
        _decorate(axes, chart)
        file = io.StringIO()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph")  # missing in a font of matplotlib; browsers have their own
            figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _themed(file.getvalue(), name, f"{chart.title}. {chart.words}.")


def _draw_line(axes: Axes, line: Line, index: int) -> None:
    color, dash = _LINES[index % len(_LINES)], _DASHES[index % len(_DASHES)]
    dots = "." if len(line.series) <= _MANY else ""
    values = _drawable(line.series)
    axes.plot(line.series.steps, values, dash, color=color, label=line.label, marker=dots, markersize=4)
    if line.low is not None and line.high is not None and line.low.steps == line.high.steps:
        low, high = _drawable(line.low), _drawable(line.high)
        axes.fill_between(line.low.steps, low, high, color=color, alpha=0.2, linewidth=0)


def _drawable(series: Series) -> list[float]:
    return [
        math.copysign(min(abs(value), _LARGEST), value) if abs(value) > 1.0 / _LARGEST or value != value else 0.0
        for value in series.values
    ]


def _decorate(axes: Axes, chart: Chart) -> None:
    if chart.can_be_log and _spans_decades([line.series for line in chart.lines]):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    if chart.level is not None:
        axes.axhline(chart.level[0], color=_INK, linestyle=(0, (1, 2)), linewidth=1, label=chart.level[1])
    if chart.marks:
        marks = chart.marks[:: math.ceil(len(chart.marks) / _MANY)]
        place = axes.get_xaxis_transform()
        axes.plot(marks, [0.0] * len(marks), "|", color=_INK, alpha=0.6, markersize=7, transform=place, clip_on=False)
    axes.set_xlabel("training batches")
    axes.margins(x=0.02)
    if _legend_rows(chart):
        axes.legend(
            fontsize=8, frameon=False, loc="lower left", bbox_to_anchor=(-0.02, 0.99), ncols=2, borderaxespad=0.0
        )


def _legend_rows(chart: Chart) -> int:
    """Returns how many rows of two entries a legend above the chart needs; a single curve needs none."""
    entries = len(chart.lines) + (chart.level is not None)
    return math.ceil(entries / 2) if entries > 1 else 0


def _spans_decades(curves: Sequence[Series]) -> bool:
    values = [value for series in curves for value in _drawable(series) if math.isfinite(value)]
    return bool(values) and min(values) > 0.0 and max(values) > 20.0 * min(values)


def _themed(svg: str, name: str, words: str) -> str:
    """Returns an SVG file as an element of a page: with its colours, ids of its own, and words."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\b(id="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    svg = svg.replace(_INK, "currentColor")
    for index, color in enumerate(_LINES):
        svg = svg.replace(color, f"var(--line-{index})")
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    head, body = svg.split(">", 1)
    head = re.sub(r' (width|height)="[^"]*"', "", head).replace("<svg", f'<svg role="img" aria-label="{escape(words)}"')
    return f"{head}>{body}"
