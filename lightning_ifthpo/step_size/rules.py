"""From noisy parabolas to a learning rate."""

from __future__ import annotations

import math
from collections import deque
from statistics import fmean, stdev
from typing import Any

from lightning_ifthpo.step_size.parabola import Parabola

_START = 0.003  # of the smallest optimal step seen: from ten times as much, some networks lose units for good
_FIRST = 3  # probes that decide on the start; a single one is off by a factor of five now and then
_WINDOW = 16  # probes
_RESTED = 8  # probes without growth that make a rate settled
_GROWTH = (
    1.08  # per probe, one at each step: slower than curvature answers (some ten steps), also through momentum of 0.9
)
_SHRINKAGE = 1.25
_FLOOR = 0.25  # of the highest rate, where a shorter step is no better
_ENOUGH = 4  # probes to judge a rate by, after it has shrunk
# per probe, and growth of a settled rate: more than what shrinking by mistake takes away (4 % of the windows)
_RECOVERY = 1.01


class AveragedRule:
    """Grows the rate while a longer step would have been better, shrinks it when steps make the loss worse.

    The slope n and curvature d along each probed update are seen on a batch that did not produce it. Over the last
    sixteen probes, the mean of n − ηd is the slope where the step of length η ends, and the mean of ηn − η²d/2 what the
    step gains. The rate grows while the slope at the end is positive by one standard error, by 8 % a probe until it has
    settled and by 1 % from then on, and the slower the nearer it is to mean(n)/mean(d), which it never passes; it
    shrinks by a fifth, and forgets what it saw, when the gain is negative by two. Where the curvature is not to blame,
    because the slope alone is as negative (as with very few batches, of which the next knows the last one), it shrinks
    to a quarter of its highest rate at most. Between the two it rests, and recovers by 1 % a probe towards the highest
    rate it has had: there lies the stationary state of noisy descent, in which the gain is zero whatever the rate, so
    that any rule that follows n/d must collapse or explode. Probes are weighed by 1/‖ω‖².

    The first rate is 0.003 of the smallest n/d of three probes; no rate has to be given.

    Args:
        lr_min: Lower bound of the rate.
        lr_max: Upper bound of the rate.

    Attributes:
        lr: The rate; None before the first probe.
        settled: Whether eight probes in a row have asked for no growth to speak of.
        refused: Probes that were not finite, and were not used.
    """

    def __init__(self, lr_min: float = 1e-8, lr_max: float = 10.0) -> None:
        self.lr: float | None = None
        self.refused = 0
        self._bounds = (lr_min, lr_max)
        self._probes: deque[tuple[float, float]] = deque(maxlen=_WINDOW)
        self._count = 0
        self._smallest = math.inf
        self._highest = 0.0
        self._resting = 0
        self.settled = False

    def observe(self, parabola: Parabola) -> bool:
        """Changes the rate by what a probe shows, slope and curvature along an update; returns whether it was used."""
        if not parabola.is_finite:
            self.refused += 1
        if not parabola.is_finite or parabola.squared_length == 0.0:
            return False
        slope, curvature = parabola.slope / parabola.squared_length, parabola.sharpness
        self._probes.append((slope, curvature))
        self._count += 1
        if self._count <= _FIRST:
            self._begin(slope, curvature)
        else:
            self._follow()
        return True

    def state_dict(self) -> dict[str, Any]:
        """Returns all that changes, as plain numbers."""
        return {
            "lr": self.lr,
            "refused": self.refused,
            "probes": [list(probe) for probe in self._probes],
            "count": self._count,
            "smallest": self._smallest,
            "highest": self._highest,
            "resting": self._resting,
            "settled": self.settled,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a state."""
        self.lr, self.refused, self._count = state["lr"], state["refused"], state["count"]
        self._smallest, self._highest = state["smallest"], state["highest"]
        self._resting, self.settled = state["resting"], state["settled"]
        self._probes.clear()
        self._probes.extend((slope, curvature) for slope, curvature in state["probes"])

    def _begin(self, slope: float, curvature: float) -> None:
        if slope > 0.0 and curvature != 0.0:
            self._smallest = min(self._smallest, slope / abs(curvature))
        start = _START * self._smallest if math.isfinite(self._smallest) else 0.0
        self._set(start if self.lr is None else min(start, self.lr * _GROWTH))

    def _follow(self) -> None:
        assert self.lr is not None
        lr, count = self.lr, len(self._probes)
        if count < _FIRST:
            return
        ends = [slope - lr * curvature for slope, curvature in self._probes]
        gains = [slope - lr * curvature / 2 for slope, curvature in self._probes]
        slope, curvature = (fmean(values) for values in zip(*self._probes, strict=True))
        if fmean(ends) > _standard_error(ends):
            best = slope / curvature if curvature > 0.0 else math.inf
            growth = _RECOVERY if self.settled else _GROWTH
            self._set(min(lr * growth ** (1.0 - lr / best), best))
        elif (
            count >= _ENOUGH
            and fmean(gains) < -2 * _standard_error(gains)
            and (lr * curvature / 2 > -slope or lr > _FLOOR * self._highest)
        ):
            self._set(lr / _SHRINKAGE)
            self._probes.clear()
        else:
            self._set(max(lr, min(lr * _RECOVERY, self._highest)))
        self._resting = 0 if self.lr > lr * _RECOVERY else self._resting + 1
        self.settled |= self._resting >= _RESTED

    def _set(self, lr: float) -> None:
        low, high = self._bounds
        self.lr = min(max(lr, low), high)
        self._highest = max(self._highest, self.lr)


class PublishedRule:
    """The rule of the paper: a moving average of the optimal step, η ← γη + (1 − γ) slope / curvature (Bu and Xu 2024).

    Where the parabola has no lowest point ahead, the rate stays as it is. Safe for plain gradient descent; with
    momentum or Adam accuracy falls to chance, because single estimates are noise.

    Args:
        lr_min: Lower bound of the rate.
        lr_max: Upper bound of the rate.
        smoothing: γ.

    Attributes:
        lr: The rate; None before the first probe.
        settled: Always true: it refreshes at regular intervals.
        refused: Probes that were not used.
    """

    settled = True

    def __init__(self, lr_min: float = 1e-8, lr_max: float = 10.0, smoothing: float = 0.9) -> None:
        self.lr: float | None = None
        self.refused = 0
        self._bounds = (lr_min, lr_max)
        self.smoothing = smoothing

    def observe(self, parabola: Parabola) -> bool:
        """Changes the rate by what a probe shows, and returns whether it was used."""
        step = parabola.optimal_step
        low, high = self._bounds
        if step is None or step <= 0.0 or not parabola.is_finite:
            self.refused += 1
            self.lr = low if self.lr is None else self.lr
            return False
        target = step if self.lr is None else self.smoothing * self.lr + (1.0 - self.smoothing) * step
        self.lr = min(max(target, low), high)
        return True

    def state_dict(self) -> dict[str, Any]:
        """Returns all that changes, as plain numbers."""
        return {"lr": self.lr, "refused": self.refused}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a state."""
        self.lr, self.refused = state["lr"], state["refused"]


def _standard_error(values: list[float]) -> float:
    return stdev(values) / math.sqrt(len(values))
