"""Rules that turn noisy slopes and curvatures into a learning rate."""

from __future__ import annotations

import math
from collections import deque
from statistics import fmean, stdev
from typing import Any

from lightning_ifthpo.step_size.parabola import Parabola

# First rate, as a part of the smallest optimal step so far. Starting 10× higher kills ReLU units permanently in some
# networks.
_START = 0.003
_FIRST = 3  # probes that set the first rate; a single one is sometimes off by a factor of five
_WINDOW = 16  # probes in the means
_RESTED = 8  # probes in a row without growth after which the rate is settled
# Growth per probe, before the rate is settled, with one probe per step. It is slow enough for the curvature to follow:
# that takes some ten steps, also with momentum 0.9.
_GROWTH = 1.08
_SHRINKAGE = 1.25
_FLOOR = 0.25  # lowest rate, as a part of the highest, where the slope and not the curvature makes the gain negative
_ENOUGH = 4  # probes that judge a rate after it has shrunk
# Growth per probe of a settled rate, and of recovery. It outweighs the shrinking by mistake, in 4 % of the windows.
_RECOVERY = 1.01


class AveragedRule:
    """Grows the learning rate η while a longer step would be better, and shrinks it when steps increase the loss.

    A probe is the slope n and the curvature d along an update, both over ‖ω‖², on a batch that did not produce the
    update. Over the last 16 probes, the mean of n − ηd is the slope at the end of a step, and the mean of ηn − η²d/2 is
    the decrease of the loss, the gain of the step.
    - The slope at the end is positive by one standard error: η grows by up to 8 % per probe, 1 % once it is settled. It
      grows more slowly near mean(n)/mean(d), and never beyond.
    - The gain is negative by two standard errors: η shrinks by a fifth, and the probes are discarded. If the curvature
      is not the cause, because −n is at least ηd/2, it shrinks to a quarter of the highest rate at most. This
      happens with very few batches, where the next batch was used shortly before.
    - Otherwise η recovers by 1 % per probe towards the highest rate so far. This is the stationary state of noisy
      descent: the gain is zero at every rate, so that a rule that follows n/d would collapse or explode.

    The first rate is 0.003 of the smallest n/d of three probes; no rate has to be given.

    Args:
        lr_min: Lower bound of the rate.
        lr_max: Upper bound of the rate.

    Attributes:
        lr: The rate; None before the first probe.
        settled: Whether the rate once grew by at most 1 % at each of eight probes in a row.
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
        """Updates the rate with a look, slope and curvature along an update; returns whether it was used."""
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
        """Returns the state, as plain numbers."""
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
        """Restores a state from `state_dict`."""
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

    If the parabola has no minimum at a positive step, the rate does not change. Safe for plain gradient descent only:
    single estimates are noise, and with momentum or Adam the accuracy falls to chance.

    Args:
        lr_min: Lower bound of the rate.
        lr_max: Upper bound of the rate.
        smoothing: γ, in [0, 1).

    Attributes:
        lr: The rate; None before the first probe.
        settled: Always true: probes come at regular intervals.
        refused: Probes that were not used.
    """

    settled = True

    def __init__(self, lr_min: float = 1e-8, lr_max: float = 10.0, smoothing: float = 0.9) -> None:
        self.lr: float | None = None
        self.refused = 0
        self._bounds = (lr_min, lr_max)
        self.smoothing = smoothing

    def observe(self, parabola: Parabola) -> bool:
        """Updates the rate with a look; returns whether it was used."""
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
        """Returns the state, as plain numbers."""
        return {"lr": self.lr, "refused": self.refused}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores a state from `state_dict`."""
        self.lr, self.refused = state["lr"], state["refused"]


def _standard_error(values: list[float]) -> float:
    return stdev(values) / math.sqrt(len(values))
