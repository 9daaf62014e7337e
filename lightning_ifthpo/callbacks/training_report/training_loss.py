"""The training loss of all batches, read from the device in groups."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from lightning_ifthpo.callbacks.training_report.records import Series, mean

_PLACES = 64  # parts of an epoch that are compared with those of the next epoch
_FEW = 16  # batches, of which an epoch has no shape


class TrainingLoss:
    """Collects the loss of each batch, and compares epochs with each other.

    Losses stay on the device until `flush`, which synchronizes once.

    Attributes:
        curve: The loss of all batches.
        first_nonfinite: Number of the first batch with a loss that is NaN or infinite; 0 if there is none.
        before_nonfinite: The largest of the last losses before it; NaN if there is none.
        likeness: Correlation of each epoch's losses, by place in the epoch and without a linear trend, with those of
            the epoch before.
        unevenness: Standard deviation of the same losses over their mean.
        smoothness: By how many standard errors neighbours are more alike than in random order.
        rises: Share of the way up in the way up and down along the epoch; 0 if the loss only falls.
    """

    def __init__(self) -> None:
        self.curve = Series()
        self.first_nonfinite = 0
        self.before_nonfinite = math.nan
        self.likeness, self.unevenness, self.smoothness, self.rises = Series(), Series(), Series(), Series()
        self._waiting: list[tuple[int, Tensor, float]] = []
        self._recent: list[float] = []
        self._epoch, self._last_epoch = Series(_PLACES), Series(_PLACES)

    def add(self, batch: int, loss: Tensor, factor: float = 1.0) -> None:
        """Keeps a reference to the loss of a batch, a scalar.

        Args:
            batch: The number of the batch.
            loss: Its loss over the factor, as with gradient accumulation.
            factor: The factor.
        """
        self._waiting.append((batch, loss.detach() if loss.requires_grad else loss, factor))

    def flush(self) -> None:
        """Reads all losses since the last time."""
        if not self._waiting:
            return
        values = torch.stack([loss.reshape(()) for _, loss, _ in self._waiting]).tolist()
        waiting, self._waiting = self._waiting, []
        for (step, _, factor), value in zip(waiting, values, strict=True):
            self._read(step, factor * value)

    def _read(self, step: int, value: float) -> None:
        if not math.isfinite(value) and not self.first_nonfinite:
            self.first_nonfinite = step
            self.before_nonfinite = max(self._recent, default=math.nan)
        self.curve.add(step, value)
        self._epoch.add(step, value)
        self._recent.append(value)
        del self._recent[:-4]

    def end_epoch(self) -> None:
        """Compares the epoch that ends with the one before."""
        self.flush()
        shape, before = detrended(self._epoch.values), detrended(self._last_epoch.values)
        if self._epoch.count >= _FEW and len(shape) == len(before):
            step, level = self.curve.count, abs(mean(self._epoch.values))
            spread = math.sqrt(mean([value**2 for value in shape]))
            self.likeness.add(step, correlation(shape, before))
            self.unevenness.add(step, spread / level if level else 0.0)
            self.smoothness.add(step, smoothness(shape))
            self.rises.add(step, rises(self._epoch.values))
        self._last_epoch, self._epoch = self._epoch, Series(_PLACES)

    def state_dict(self) -> dict[str, Any]:
        """Returns everything that resuming needs, as plain numbers and lists; call `flush` first."""
        return {
            "nonfinite": [self.first_nonfinite, self.before_nonfinite],
            "recent": list(self._recent),
            **{name: series.state_dict() for name, series in self._all_series().items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a result of `state_dict`."""
        self.first_nonfinite, self.before_nonfinite = state["nonfinite"]
        self._recent = list(state["recent"])
        for name, series in self._all_series().items():
            series.load_state_dict(state[name])

    def _all_series(self) -> dict[str, Series]:
        return {
            "curve": self.curve,
            "likeness": self.likeness,
            "unevenness": self.unevenness,
            "smoothness": self.smoothness,
            "rises": self.rises,
            "epoch": self._epoch,
            "last_epoch": self._last_epoch,
        }


def detrended(values: Sequence[float]) -> list[float]:
    """Returns the deviations of values from the straight line that fits them best; zeros if one is not finite."""
    if not values or not all(map(math.isfinite, values)):
        return [0.0] * len(values)
    middle, level = (len(values) - 1) / 2, mean(values)
    squares = math.fsum((place - middle) ** 2 for place in range(len(values)))
    slope = math.fsum((place - middle) * value for place, value in enumerate(values)) / (squares or 1.0)
    return [value - level - slope * (place - middle) for place, value in enumerate(values)]


def correlation(left: Sequence[float], right: Sequence[float]) -> float:
    """Returns the cosine of two vectors of deviations; 0 if one is zero."""
    scale = math.sqrt(math.fsum(value**2 for value in left) * math.fsum(value**2 for value in right))
    return math.fsum(a * b for a, b in zip(left, right, strict=True)) / scale if scale else 0.0


def smoothness(deviations: Sequence[float]) -> float:
    """Returns (1 − r) √n: r is the mean squared difference of n neighbours over twice the variance (von Neumann 1941).

    In random order r has mean 1 and standard deviation 1/√n.
    """
    variance = mean([value**2 for value in deviations])
    steps = [(after - before) ** 2 for before, after in pairwise(deviations)]
    return (1.0 - mean(steps) / (2.0 * variance)) * math.sqrt(len(deviations)) if variance > 0.0 else 0.0


def noise(values: Sequence[float]) -> float:
    """Returns the standard deviation of values around a slow change, from the differences of neighbours; 0 without."""
    steps = [(after - before) ** 2 for before, after in pairwise(values)]
    return math.sqrt(mean(steps) / 2.0) if steps else 0.0


def rises(values: Sequence[float]) -> float:
    """Returns the sum of steps up over the sum of the sizes of all steps; 0 if there are none."""
    steps = [after - before for before, after in pairwise(values)]
    way = math.fsum(map(abs, steps))
    return math.fsum(step for step in steps if step > 0.0) / way if 0.0 < way < math.inf else 0.0
