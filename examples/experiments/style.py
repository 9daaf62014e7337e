"""How the pictures look: one style, a colour for each role, and marks that tell the roles apart without colour.

A page shows a picture 800 pixels wide, so that 9 points are 12.5 pixels there. The colours are those of Okabe and Ito
(2008, "Color Universal Design") and a grey; they stay apart for those who cannot tell red from green.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

WIDTH = 8.0  # inches of every picture
STYLE: dict[Any, Any] = {
    "figure.dpi": 150,  # one and a half pixels for each that a page shows
    "font.size": 9,
    "figure.titlesize": 11.5,
    "figure.titleweight": "bold",
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "legend.handlelength": 2.8,  # of which two dashes are visible
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#767676",
    "axes.grid": True,
    "grid.color": "#E4E4E4",
    "axes.axisbelow": True,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "image.cmap": "gray",
    "image.interpolation": "nearest",
}


class Role(NamedTuple):
    """What a mark stands for, in all pictures."""

    color: str
    marker: str
    dash: Any = "-"

    def line(self, **others: Any) -> dict[str, Any]:
        """Returns arguments of `Axes.plot` for a curve."""
        return {"color": self.color, "linestyle": self.dash, **others}

    def points(self, **others: Any) -> dict[str, Any]:
        """Returns arguments of `Axes.plot` for points that no line connects."""
        return {"color": self.color, "marker": self.marker, "linestyle": "none", "markeredgewidth": 0.0, **others}


OURS = Role("#0072B2", "o")  # blue: hypergradients, and the callbacks of this package
PLAIN = Role("#767676", "s", (0, (5, 2)))  # grey: the same without them
OTHER = Role("#CC79A7", "D", (0, (5, 2, 1, 2)))  # purple: another method in the same comparison
BOUND = Role("#000000", "*", (0, (3, 2)))  # black: the exact result, an oracle, a limit
WRONG = Role("#D55E00", "X", (0, (1, 1.5)))  # vermilion: what is wrong or has failed
TRAINING = Role("#56B4E9", "^", (0, (1, 1.5)))  # sky blue: on training images
OUTER = Role("#E69F00", "s", (0, (5, 2)))  # orange: on outer, that is validation images
TEST = Role("#009E73", "o")  # green: on test images


def page(height: float, headline: str) -> Figure:
    """Returns a figure of the common width, under the sentence that it shows."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    figure.suptitle(headline, x=0.01, ha="left")
    return figure


def curve(panel: Axes, steps: Sequence[float], by_seed: Tensor, role: Role, **others: Any) -> None:
    """Draws the mean of curves [seeds, steps] and, if there are several, a band from the lowest to the highest."""
    panel.plot(steps, by_seed.mean(0), **role.line(**others))
    if len(by_seed) > 1:
        lowest, highest = by_seed.aminmax(dim=0)
        panel.fill_between(steps, lowest, highest, color=role.color, alpha=0.18, linewidth=0)


def dots(panel: Axes, place: float, by_seed: Sequence[float], role: Role, label: str | None = None) -> None:
    """Draws a point for each seed in a row and, if there are several, a bar at their mean."""
    panel.plot(by_seed, [place] * len(by_seed), **role.points(alpha=0.6, label=label))
    if len(by_seed) > 1:
        mean = sum(by_seed) / len(by_seed)
        panel.plot(mean, place, "|", color=role.color, markersize=14, markeredgewidth=2.5)


def name_rows(panel: Axes, labels: Sequence[str]) -> None:
    """Names the rows of a panel, from top to bottom."""
    panel.set(ylim=(len(labels) - 0.5, -0.5), yticks=range(len(labels)), yticklabels=labels)
    panel.grid(visible=False, axis="y")
    panel.tick_params(axis="y", length=0)
    panel.spines["left"].set_visible(False)


def styled() -> Any:
    """Returns the block in which pictures are drawn and written; matplotlib is left as it was."""
    return mpl.rc_context(STYLE)
