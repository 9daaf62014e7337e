"""Rules that turn noisy slopes and curvatures into a learning rate."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from statistics import fmean, stdev
from typing import Any

from lightning_ifthpo.step_size.parabola import Parabola

# First rate, over the smallest optimal step so far. Starting 10× higher kills ReLU units permanently in some networks.
_START = 0.003
_FIRST = 3  # looks that set the first rate; a single one is sometimes off by a factor of five
_WINDOW = 16  # looks in the means
_RESTED = 8  # looks in a row without growth after which the rate is settled
# Growth per look, before the rate is settled, with one look per step. It is slow enough for the curvature to follow:
# that takes some ten steps, also with momentum 0.9.
_GROWTH = 1.08
_SHRINKAGE = 1.25
_FLOOR = 0.25  # lowest rate over the highest, if the slope and not the curvature makes the gain negative
_ENOUGH = 4  # looks that judge a rate after it has shrunk
# Updates that are longer than the last and too long, look after look, diverge: ‖ω‖² grows by more than 10 over three
# looks, 100 over two, or 1,000 in one. Beyond the edge of stability it grows like (1 − ηλ)², from 1e-30 to 1e100 within
# a hundred steps where a rare look every eighth step was used. Looks come at every step from a growth of 4 on.
_DIVERGENCE = 10.0
_ALARM = 4.0
# Growth per look of a settled rate, and in recovery. It outweighs mistaken shrinking, seen in 4 % of the windows.
_RECOVERY = 1.01


class Rule(ABC):
    """Chooses a learning rate from looks. A look measures slope and curvature of the loss along an update.

    Attributes:
        lr: The rate; None before the first look.
        refused: Number of looks that could not be used.
        settled: Whether the rate has stopped changing fast, so that looks can be rare.
    """

    settled = True
    _STATE: tuple[str, ...] = ("lr", "refused")

    def __init__(self, lr_min: float, lr_max: float) -> None:
        self.lr: float | None = None
        self.refused = 0
        self._bounds = (lr_min, lr_max)

    @property
    def watchful(self) -> bool:
        """Whether looks have to come at every step."""
        return not self.settled

    @abstractmethod
    def observe(self, parabola: Parabola, decay: float = 1.0) -> bool:
        """Updates the rate with a look; returns whether the look was used.

        Below one, `decay` is the factor of a final decay, by which steps are shorter than the rate; the rate then only
        falls.
        """

    def state_dict(self) -> dict[str, Any]:
        """Returns the state, as plain numbers."""
        return {name.removeprefix("_"): getattr(self, name) for name in self._STATE}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from a state."""
        for name in self._STATE:
            setattr(self, name, state[name.removeprefix("_")])

    def _within_bounds(self, lr: float) -> float:
        low, high = self._bounds
        return min(max(lr, low), high)


class AveragedRule(Rule):
    """Grows the learning rate η while a longer step would be better, and shrinks it when steps increase the loss.

    A look gives the slope n and the curvature d along an update, both over ‖ω‖², on a batch that did not produce the
    update. Over the last 16 looks, the mean of n − ηd is the slope at the end of a step, and the mean of ηn − η²d/2 is
    the decrease of the loss, the gain of the step.

    - The slope at the end is positive by one standard error: η grows by up to 8 % per look, 1 % once it is settled. It
      grows more slowly near mean(n)/mean(d), and never beyond.
    - The gain is negative by two standard errors: η shrinks by a fifth, and the looks are discarded. If −n is at least
      ηd/2, the curvature is not the cause, and η shrinks to a quarter of the highest rate at most. This happens with
      very few batches, where the next batch was used shortly before.
    - The updates grow, look after look, with ηd/2 > n > 0: descent diverges, as where directions of high curvature had
      vanished while the rate grew. η becomes mean(n)/mean(d) of these looks at once, and all looks are discarded.
    - Otherwise η recovers by 1 % per look towards the highest rate so far. This is the stationary state of noisy
      descent: the gain is zero at every rate, so that a rule that follows n/d would collapse or explode.

    The first rate is 0.003 of the smallest n/d of three looks; no rate has to be given. The rate is settled once it has
    grown by at most 1 % at each of eight looks in a row. Only looks that are not finite are refused.

    Args:
        lr_min: Lower bound of the rate.
        lr_max: Upper bound of the rate.

    >>> from lightning_ifthpo.step_size import Parabola
    >>> rule = AveragedRule()
    >>> used = [rule.observe(Parabola(slope=1.0, curvature=10.0, squared_length=1.0)) for _ in range(100)]
    >>> 0.0 < rule.lr <= 1 / 10  # it grows towards the optimal step, and never beyond
    True
    """

    _STATE = (*Rule._STATE, "_probes", "_count", "_smallest", "_highest", "_resting", "_rise", "settled")

    def __init__(self, lr_min: float = 1e-8, lr_max: float = 10.0) -> None:
        super().__init__(lr_min, lr_max)
        self.settled = False
        self._probes: list[list[float]] = []  # slope and curvature of the last looks
        self._count = 0
        self._smallest = math.inf
        self._highest = 0.0
        self._resting = 0
        # looks in a row with growing updates that are too long, growth of ‖ω‖² over them, and the last ‖ω‖²
        self._rise = (0, 1.0, math.inf)

    @property
    def watchful(self) -> bool:
        """Whether looks have to come at every step: until the rate has settled, and while updates grow."""
        return not self.settled or self._rise[1] >= _ALARM

    def observe(self, parabola: Parabola, decay: float = 1.0) -> bool:
        """Updates the rate with a look; returns whether it was used."""
        self.refused += not parabola.is_finite
        if not parabola.is_finite or parabola.squared_length == 0.0:
            return False
        slope, curvature = parabola.slope / parabola.squared_length, parabola.sharpness
        self._probes = [*self._probes[1 - _WINDOW :], [slope, curvature]]
        self._count += 1
        if self._count <= _FIRST:
            self._begin(slope, curvature)
        elif self._diverges(slope, curvature, parabola.squared_length, decay):
            slopes, curvatures = zip(*self._probes[-self._rise[0] :], strict=True)
            self._set(fmean(slopes) / fmean(curvatures) / decay)
            self._probes, self._rise = [], (0, 1.0, math.inf)
        else:
            self._follow(decay)
        return True

    def _diverges(self, slope: float, curvature: float, squared_length: float, decay: float) -> bool:
        """Returns whether updates grow, look by look, while they increase the loss because they are too long."""
        assert self.lr is not None
        count, growth, last = self._rise
        too_long = 0.0 < slope < self.lr * decay * curvature / 2
        rises = too_long and squared_length > last
        self._rise = (count + 1, growth * squared_length / last, squared_length) if rises else (0, 1.0, squared_length)
        return rises and self._rise[1] >= _DIVERGENCE ** (4 - min(self._rise[0], 3))

    def _begin(self, slope: float, curvature: float) -> None:
        if slope > 0.0 and curvature != 0.0:
            self._smallest = min(self._smallest, slope / abs(curvature))
        start = _START * self._smallest if math.isfinite(self._smallest) else 0.0
        self._set(start if self.lr is None else min(start, self.lr * _GROWTH))

    def _follow(self, decay: float) -> None:
        assert self.lr is not None
        lr, count = self.lr * decay, len(self._probes)
        if count < _FIRST:
            return
        ends = [slope - lr * curvature for slope, curvature in self._probes]
        gains = [slope - lr * curvature / 2 for slope, curvature in self._probes]
        slope, curvature = (fmean(values) for values in zip(*self._probes, strict=True))
        if decay == 1.0 and fmean(ends) > _standard_error(ends):
            best = slope / curvature if curvature > 0.0 else math.inf
            growth = _RECOVERY if self.settled else _GROWTH
            self._set(min(lr * growth ** (1.0 - lr / best), best))
        elif (
            count >= _ENOUGH
            and fmean(gains) < -2 * _standard_error(gains)
            and (lr * curvature / 2 > -slope or lr > _FLOOR * self._highest)
        ):
            self._set(self.lr / _SHRINKAGE)
            self._probes = []
        elif decay == 1.0:
            self._set(max(lr, min(lr * _RECOVERY, self._highest)))
        self._resting = 0 if self.lr > lr * _RECOVERY else self._resting + 1
        self.settled |= self._resting >= _RESTED

    def _set(self, lr: float) -> None:
        self.lr = self._within_bounds(lr)
        self._highest = max(self._highest, self.lr)


class PublishedRule(Rule):
    """The rule of the paper: a moving average of the optimal step, η ← γη + (1 − γ) slope / curvature (Bu and Xu 2024).

    If the parabola has no minimum at a positive step, the look is refused and the rate does not change. Safe for plain
    gradient descent only: single estimates are noise, and with momentum or Adam the accuracy falls to chance. The rate
    always counts as settled, so that looks come at regular intervals.

    Args:
        lr_min: Lower bound of the rate.
        lr_max: Upper bound of the rate.
        smoothing: γ, in [0, 1).

    >>> from lightning_ifthpo.step_size import Parabola
    >>> rule = PublishedRule(smoothing=0.5)
    >>> used = [rule.observe(Parabola(slope=1.0, curvature=curvature, squared_length=1.0)) for curvature in (10.0, 5.0)]
    >>> round(rule.lr, 3)  # 1/10, and then halfway from there to 1/5
    0.15
    """

    def __init__(self, lr_min: float = 1e-8, lr_max: float = 10.0, smoothing: float = 0.9) -> None:
        super().__init__(lr_min, lr_max)
        self.smoothing = smoothing

    def observe(self, parabola: Parabola, decay: float = 1.0) -> bool:
        """Updates the rate with a look; returns whether it was used. In a decay only steps that are too long count."""
        step = parabola.optimal_step
        if step is None or step <= 0.0 or not parabola.is_finite:
            self.refused += 1
            self.lr = self._bounds[0] if self.lr is None else self.lr
            return False
        if decay < 1.0 and self.lr is not None and self.lr * decay < 2.0 * step:
            return True  # the step does not increase the loss
        target = step if self.lr is None else self.smoothing * self.lr + (1.0 - self.smoothing) * step
        self.lr = self._within_bounds(target)
        return True


def _standard_error(values: list[float]) -> float:
    return stdev(values) / math.sqrt(len(values))
