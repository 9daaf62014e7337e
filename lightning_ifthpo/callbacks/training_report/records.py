"""Curves of a run in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_ifthpo.core.validation import require_at_least

CAPACITY = 500  # points; a chart is some 400 pixels wide


class Series:
    """A curve of at most `capacity` points: when it is full, each two neighbours become their mean.

    A point is the mean of `stride` values in a row, and its step that of the last of them. NaN and infinity are counted
    and left out of the mean. Memory is bounded, and each value costs a few additions.

    Args:
        capacity: Largest number of points, even.

    Attributes:
        steps: The step of each point, ascending.
        values: Its value.
        count: Number of values that were added.
        nonfinite: Number of those that were NaN or infinite.
        first, last, least, most: Of the finite values that were added; NaN if there are none.

    >>> series = Series(capacity=4)
    >>> for step in range(8):
    ...     series.add(step, float(step))
    >>> series.steps, series.values
    ([1, 3, 5, 7], [0.5, 2.5, 4.5, 6.5])
    """

    def __init__(self, capacity: int = CAPACITY) -> None:
        require_at_least("capacity", capacity, 2)
        self._capacity = capacity + capacity % 2
        self._stride = 1
        self._pending: list[float] = []
        self.steps: list[int] = []
        self.values: list[float] = []
        self.count = self.nonfinite = 0
        self.first = self.last = self.least = self.most = math.nan

    def __len__(self) -> int:
        return len(self.values)

    def add(self, step: int, value: float) -> None:
        """Adds a value."""
        self.count += 1
        if math.isfinite(value):
            self.first = value if math.isnan(self.first) else self.first
            self.last = value
            self.least = value if math.isnan(self.least) else min(self.least, value)
            self.most = value if math.isnan(self.most) else max(self.most, value)
        else:
            self.nonfinite += 1
        self._pending.append(value)
        if len(self._pending) < self._stride:
            return
        if len(self.values) == self._capacity:
            self._halve()
        if len(self._pending) == self._stride:
            self.steps.append(step)
            self.values.append(mean(self._pending))
            self._pending = []

    def part(self, begin: float, end: float = 1.0) -> list[float]:
        """Returns the finite points between two fractions of the curve; at least one if there is any."""
        count = len(self.values)
        start = min(int(begin * count), max(0, count - 1))
        stop = max(start + 1, math.ceil(end * count))
        return [value for value in self.values[start:stop] if math.isfinite(value)]

    def state_dict(self) -> dict[str, Any]:
        """Returns everything that resuming needs, as plain numbers and lists."""
        return {
            "stride": self._stride,
            "pending": list(self._pending),
            "steps": list(self.steps),
            "values": list(self.values),
            "counts": [self.count, self.nonfinite],
            "extremes": [self.first, self.last, self.least, self.most],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a result of `state_dict`."""
        self._stride, self._pending = state["stride"], list(state["pending"])
        self.steps, self.values = list(state["steps"]), list(state["values"])
        self.count, self.nonfinite = state["counts"]
        self.first, self.last, self.least, self.most = state["extremes"]

    def _halve(self) -> None:
        self.values = [mean(self.values[index : index + 2]) for index in range(0, len(self.values), 2)]
        self.steps = self.steps[1::2]
        self._stride *= 2


class Records:
    """Series by name, of which there are at most `most`; further names are ignored.

    Args:
        most: Largest number of series.
    """

    def __init__(self, most: int = 100) -> None:
        self._most = most
        self._series: dict[str, Series] = {}

    def __getitem__(self, name: str) -> Series:
        """Returns a series, which is empty if nothing was added."""
        return self._series[name] if name in self._series else Series()

    def names(self, prefix: str = "") -> list[str]:
        """Returns the names with a prefix, in the order in which they came."""
        return [name for name in self._series if name.startswith(prefix)]

    def open(self, name: str) -> Series:
        """Returns a series to add to; one that is not kept if there are too many."""
        if name not in self._series and len(self._series) < self._most:
            self._series[name] = Series()
        return self[name]

    def state_dict(self) -> dict[str, Any]:
        """Returns everything that resuming needs, as plain numbers and lists."""
        return {name: series.state_dict() for name, series in self._series.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a result of `state_dict`."""
        self._series = {}
        for name, values in state.items():
            self._series[name] = Series()
            self._series[name].load_state_dict(values)


def mean(values: Sequence[float]) -> float:
    """Returns the mean of the finite values; NaN if there is none."""
    finite = [value for value in values if math.isfinite(value)]
    return math.fsum(finite) / len(finite) if finite else math.nan
