"""Plots of curvature, rates, hyperparameters and labels; `pip install 'lightning_ifthpo[plots]'` for matplotlib."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_ifthpo.core.validation import require_at_least
from lightning_ifthpo.spectrum import SpectralDensity
from lightning_ifthpo.step_size import RateSuggestion
from lightning_ifthpo.wrong_labels import LabelIssues

_MEAN = re.compile(r"hyperparameter/[^/]+/mean")
# Blue, vermilion and a grey that the colour-blind can tell apart (Okabe and Ito 2008, "Color Universal Design").
_POSITIVE, _NEGATIVE, _TINY = "#0072B2", "#D55E00", "#767676"
_LINES: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("lambda_max", "λ_max", {"color": _POSITIVE}),
    ("critical", "critical sharpness", {"color": _POSITIVE}),
    ("lambda_min", "λ_min", {"color": _NEGATIVE, "linestyle": ":"}),
    ("edge", "stability edge", {"color": "black", "linestyle": "--", "linewidth": 1}),
)


def plot_spectral_density(density: SpectralDensity, *, bins_per_decade: int = 6) -> Figure:
    """Returns a histogram of all eigenvalues with logarithmic axes, which show a few large and many tiny ones at once.

    Eigenvalues of magnitude below a thousandth of the largest share one grey bin around zero; other negative ones are
    red, other positive ones blue.

    Args:
        density: Result of `spectral_density`.
        bins_per_decade: Number of bins per factor of ten.

    Raises:
        ValueError: If the density is not finite.
    """
    values, weights = density.eigenvalues, density.weights
    if not bool(values.isfinite().all()):
        raise ValueError("the spectral density is not finite; check that the loss and the weights were finite")
    smallest, largest = float(values[0]), float(values[-1])
    tiny = max(-smallest, largest) / 1000 or 1.0  # any width will do if all eigenvalues are zero
    powers = torch.arange(3 * bins_per_decade + 2, dtype=values.dtype) / bins_per_decade
    edges = tiny * torch.cat([-(10**powers).flip(0), 10**powers])
    heights = torch.bincount(torch.bucketize(values, edges[1:-1]), weights, minlength=len(edges) - 1)

    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.add_subplot()
    middle = len(heights) // 2
    colors = [_NEGATIVE] * middle + [_TINY] + [_POSITIVE] * middle
    lefts, widths = edges[:-1].tolist(), edges.diff().tolist()
    axes.bar(lefts, heights.tolist(), widths, align="edge", color=colors, edgecolor="white", linewidth=0.3)
    axes.set_xscale("symlog", linthresh=tiny, linscale=0.2)
    decades = [10.0**power for power in range(math.ceil(math.log10(tiny * 3)), math.floor(math.log10(tiny * 1e3)) + 1)]
    axes.set_xticks([*(-decade for decade in reversed(decades)), 0.0, *decades])
    axes.minorticks_off()
    axes.set(yscale="log", xlabel="eigenvalue", ylabel="fraction of eigenvalues")
    axes.set_title(
        f"λ from {smallest:.3g} to {largest:.3g}: {float(heights[:middle].sum()):.1%} below −{tiny:.1g}, "
        f"{float(heights[middle]):.1%} within {tiny:.1g} of zero",
        fontsize=10,
    )
    return figure


def plot_sharpness(
    metrics_csv: str | Path, axes: Axes | None = None, *, name: str = "sharpness", log: bool = False
) -> Axes:
    """Draws λ_max and λ_min, or the critical sharpness where it is no bound, and the stability edge over a run.

    `axes.figure.savefig(path)` saves it.

    Args:
        metrics_csv: The metrics.csv that a `CSVLogger` wrote in a run with a `SharpnessMonitor`.
        axes: Axes to draw on; a new figure if None.
        name: The `name` of the monitor.
        log: Whether to draw curvature on a logarithmic scale, for an edge that is far above λ_max.

    Raises:
        ValueError: If the file has no such measurements.
    """
    rows = [row for row in _rows(metrics_csv) if row.get(f"{name}/lambda_max") or row.get(f"{name}/critical")]
    if not rows:
        raise ValueError(
            f"{metrics_csv} has no values of {name}/lambda_max or {name}/critical; train with SharpnessMonitor and "
            "CSVLogger, and pass the name of the monitor if it has one"
        )
    if axes is None:
        axes = Figure(figsize=(6.4, 3.6), layout="constrained").add_subplot()
    for row in rows:
        if float(row.get(f"{name}/bound") or 0.0):
            row[f"{name}/critical"] = ""
    for key, label, style in _LINES:
        values = [(int(row["step"]), float(row[f"{name}/{key}"])) for row in rows if row.get(f"{name}/{key}")]
        if values:
            axes.plot(*zip(*values, strict=True), label=label, **style)
    if log:
        largest = max(float(row.get(f"{name}/lambda_max") or row[f"{name}/critical"] or 0.0) for row in rows)
        axes.set_yscale("symlog", linthresh=(abs(largest) or 1.0) / 100)
    axes.set(xlabel="step", ylabel="curvature")
    axes.legend(fontsize=8)
    return axes


def plot_hyperparameters(metrics_csv: str | Path, axes: Axes | None = None, *, log: bool = True) -> Axes:
    """Draws each hyperparameter's mean over a run, with a band from its minimum to its maximum, in natural units.

    Args:
        metrics_csv: The metrics.csv that a `CSVLogger` wrote in a run with an `IFTHypergradient`.
        axes: Axes to draw on; a new figure if None.
        log: Whether to draw values on a logarithmic scale, if all of them are positive.

    Raises:
        ValueError: If the file has no hyperparameters.
    """
    rows = _rows(metrics_csv)
    names = [column.split("/")[1] for column in rows[0] if _MEAN.fullmatch(column)] if rows else []
    if not names:
        raise ValueError(f"{metrics_csv} has no hyperparameters; train with IFTHypergradient and CSVLogger")
    if axes is None:
        axes = Figure(figsize=(6.4, 3.6), layout="constrained").add_subplot()
    is_positive = True
    for name in names:
        columns = [f"hyperparameter/{name}/{key}" for key in ("mean", "min", "max")]
        table = [[int(row["step"]), *(float(row[column]) for column in columns)] for row in rows if row[columns[0]]]
        steps, means, lowest, highest = zip(*table, strict=True)
        (line,) = axes.plot(steps, means, label=name)
        axes.fill_between(steps, lowest, highest, color=line.get_color(), alpha=0.2, linewidth=0)
        is_positive = is_positive and min(lowest) > 0.0
    axes.set(xlabel="step", ylabel="hyperparameter", yscale="log" if log and is_positive else "linear")
    axes.legend(fontsize=8)
    return axes


def plot_rate_suggestion(suggestion: RateSuggestion, axes: Axes | None = None) -> Axes:
    """Draws the loss that each learning rate of a race ended with, the suggested rate and the edge.

    Trials that diverged are crosses at the top.

    Args:
        suggestion: Result of `ExactGeN.suggest`.
        axes: Axes to draw on; a new figure if None.
    """
    if axes is None:
        axes = Figure(figsize=(6.4, 3.6), layout="constrained").add_subplot()
    finished = [trial for trial in suggestion.trials if math.isfinite(trial.loss)]
    lost = [trial.lr for trial in suggestion.trials if not math.isfinite(trial.loss)]
    axes.plot(*zip(*finished, strict=True), color=_POSITIVE, marker="o", label="trials")
    label = f"suggestion {suggestion.lr:.3g}"
    lowest = dict(finished)[suggestion.lr]
    axes.plot(suggestion.lr, lowest, "o", color=_NEGATIVE, markersize=10, zorder=3, label=label)
    if lost:
        top = axes.get_xaxis_transform()  # the height of the panel is one
        axes.plot(lost, [0.96] * len(lost), "x", color=_TINY, transform=top, label="diverged")
    if math.isfinite(suggestion.edge):
        axes.axvline(suggestion.edge, color="black", linestyle="--", linewidth=1, label=f"edge {suggestion.edge:.3g}")
    steps = "one step" if suggestion.trial_steps == 1 else f"{suggestion.trial_steps} steps"
    axes.set(xscale="log", xlabel="learning rate", ylabel=f"training loss after {steps}")
    axes.legend(fontsize=8)
    return axes


def plot_label_issues(
    issues: LabelIssues, images: Any, *, names: Sequence[str] | None = None, count: int = 24
) -> Figure:
    """Shows the examples whose labels are most likely wrong, each with its given and its likely label.

    Args:
        issues: Result of `label_issues`.
        images: The images of the data set, [n, height, width] or [n, channels, height, width], or anything that gives
            such an image, or a tuple that starts with one, for an index: a data set. One channel is shown in grey,
            three as colours, from 0 to 1 or bytes.
        names: Name of each class; by default its number.
        count: Number of images to show, at most.

    Raises:
        ValueError: If count < 1.
    """
    require_at_least("count", count, 1)
    rows = list(issues.head(count))
    columns = min(6, len(rows))
    lines = math.ceil(len(rows) / columns)
    figure = Figure(figsize=(1.35 * columns, 1.6 * lines), layout="constrained")
    for row, axes in zip(rows, figure.subplots(lines, columns, squeeze=False).flat, strict=False):
        image = images[row["index"]]
        pixels = torch.as_tensor(image[0] if isinstance(image, tuple) else image).detach().cpu()
        pixels = pixels.movedim(0, -1).squeeze(-1) if pixels.ndim == 3 else pixels
        axes.imshow(pixels.numpy() if pixels.dtype == torch.uint8 else pixels.float().numpy(), cmap="gray_r")
        labels = [row["given_label"], row["predicted_label"]]
        given, likely = (str(label if names is None else names[label]) for label in labels)
        axes.set_title(f"{given} → {likely}" if row["is_label_issue"] else given, fontsize=10)
    for axes in figure.axes:
        axes.set_axis_off()
    return figure


def _rows(metrics_csv: str | Path) -> list[dict[str, str]]:
    """Returns the rows of a file that a `CSVLogger` wrote."""
    with Path(metrics_csv).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))
