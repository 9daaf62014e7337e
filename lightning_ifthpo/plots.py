"""Pictures of curvature; needs matplotlib (`pip install 'lightning_ifthpo[plots]'`)."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_ifthpo.spectrum import SpectralDensity

_LINES: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("sharpness/lambda_max", "λ_max", {"color": "tab:blue"}),
    ("sharpness/lambda_min", "λ_min", {"color": "tab:red"}),
    ("sharpness/edge", "stability edge", {"color": "black", "linestyle": "--", "linewidth": 1}),
)


def plot_spectral_density(density: SpectralDensity, *, bins: int = 60) -> Figure:
    """Returns a histogram of all eigenvalues, in which a few large and many tiny ones can be seen at once.

    Eigenvalues are on an inverse hyperbolic sine scale, linear about zero and logarithmic beyond a thousandth of the
    largest magnitude; the fraction in each bin is on a logarithmic scale. Negative eigenvalues are red.

    Args:
        density: As `spectral_density` returns it.
        bins: Number of bins.

    Raises:
        ValueError: If the density is not finite.
    """
    if not bool(density.eigenvalues.isfinite().all()):
        raise ValueError("the spectral density is not finite; look at the loss and the weights it was measured at")
    smallest, largest = float(density.eigenvalues[0]), float(density.eigenvalues[-1])
    width = max(-smallest, largest) / 1000 or 1.0
    scaled = (density.eigenvalues / width).asinh()
    low, high = float(scaled[0]), float(scaled[-1])
    edges = torch.linspace(low - 0.1, high + 0.1, bins + 1, dtype=scaled.dtype)
    heights = torch.zeros(bins, dtype=scaled.dtype)
    heights.index_add_(0, torch.bucketize(scaled, edges[1:-1]), density.weights)
    edges = edges.sinh() * width

    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.add_subplot()
    lefts, widths = edges[:-1].tolist(), edges.diff().tolist()
    colors = ["tab:red" if right <= 0.0 else "tab:blue" for right in edges[1:].tolist()]
    axes.bar(lefts, heights.tolist(), widths, align="edge", color=colors, edgecolor="white", linewidth=0.3)
    axes.set_xscale("asinh", linear_width=width)
    axes.set_yscale("log")
    axes.axvline(0.0, color="black", linewidth=0.8)
    axes.set(xlabel="eigenvalue", ylabel="fraction of eigenvalues")
    negative = float(density.weights[density.eigenvalues < 0.0].sum())
    axes.set_title(f"λ from {smallest:.3g} to {largest:.3g}, {negative:.0%} of them negative", fontsize=10)
    return figure


def plot_sharpness(metrics_csv: str | Path, axes: Axes | None = None) -> Axes:
    """Draws λ_max, λ_min and the stability edge over a run; `axes.figure.savefig(path)` saves it.

    Args:
        metrics_csv: The metrics.csv that a `CSVLogger` wrote while a `SharpnessMonitor` was at work.
        axes: Where to draw; a new figure where not given.

    Raises:
        ValueError: If the file holds no such measurements.
    """
    with Path(metrics_csv).open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get("sharpness/lambda_max")]
    if not rows:
        raise ValueError(
            f"{metrics_csv} has no values of sharpness/lambda_max; train with SharpnessMonitor and CSVLogger"
        )
    if axes is None:
        axes = Figure(figsize=(6.4, 3.6), layout="constrained").add_subplot()
    for name, label, style in _LINES:
        values = [(int(row["step"]), float(row[name])) for row in rows if row.get(name)]
        if values:
            axes.plot(*zip(*values, strict=True), label=label, **style)
    axes.set(xlabel="step", ylabel="curvature")
    axes.legend(fontsize=8)
    return axes
