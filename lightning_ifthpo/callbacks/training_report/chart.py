"""What a chart shows, as data."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_ifthpo.callbacks.training_report.records import Series


@dataclass(frozen=True)
class Line:
    """A curve of a chart, perhaps with a band around it.

    Attributes:
        label: Its name in the legend.
        series: Its points.
        low, high: Edges of a band, with points at the same steps.
    """

    label: str
    series: Series
    low: Series | None = None
    high: Series | None = None

    @property
    def words(self) -> str:
        """What the curve shows, in numbers."""
        series = self.series
        return (
            f"{self.label}: from {_number(series.first)} to {_number(series.last)}, between {_number(series.least)} "
            f"and {_number(series.most)}"
        )


@dataclass(frozen=True)
class Chart:
    """Curves over training batches.

    Attributes:
        title: What is shown.
        lines: The curves; empty ones are left out.
        level: Where to draw a horizontal line, with its name.
        marks: Batches to mark on the horizontal axis.
        can_be_log: Whether to use a logarithmic scale where positive values span more than a factor of 20.
    """

    title: str
    lines: tuple[Line, ...]
    level: tuple[float, str] | None = None
    marks: tuple[int, ...] = ()
    can_be_log: bool = True

    @property
    def words(self) -> str:
        """The chart in words, for those who do not see it."""
        return "; ".join(line.words for line in self.lines if line.series.count)

    @property
    def has_data(self) -> bool:
        """Whether there is a finite point to draw."""
        return any(len(line.series) and line.series.count > line.series.nonfinite for line in self.lines)


def _number(value: float) -> str:
    return f"{value:.3g}"
