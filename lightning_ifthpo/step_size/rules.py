"""Rules that turn noisy slopes and curvatures into a learning rate."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from statistics import fmean, stdev
from typing import Any

from lightning_ifthpo.step_size.parabola import Parabola

_REACH, _CLIMB = 333.0, 0.2  # least growth of the rate, and in which fraction of the run
_WINDOW = 8  # looks in the means, and looks in a row without growth after which the rate is settled
# A step is taken back, and the rate lowered, if it raises the loss by this part, and by this multiple of the largest
# rise at the last looks; where nothing is left to learn, noise raises the loss by more than any fixed part of it.
_RISE, _UNSEEN = 0.3, 2.0

_START = 0.003  # first rate over n/d
_FIRST = 3  # looks before the rate grows; a window of them after it has fallen
# Standard errors below zero of the mean gain that show that a rate is too high. On noisy data the gain of a settled
# rate is zero, and it should not be lowered by chance in a long run.
_ERRORS = 4.0
_GROWTH = 1.08  # per step; slow enough for the curvature to follow, which takes some ten steps, also with momentum 0.9
_FASTEST = 2.0  # growth per step in runs of a few steps, which are too short to climb
_LONGEST = 100  # steps of the climb where the length of the run is unknown: 2,000-fold
_SHRINKAGE = 0.6


class Rule(ABC):
    """Chooses a learning rate from looks. A look measures slope and curvature of the loss along an update.

    Attributes:
        lr: The rate; None before the first look.
        refused: Number of looks that could not be used.
        settled: Whether the rate has stopped changing fast, so that looks can be rare.
        corrected: The rate at which the update of the last look should have been applied, if it was far too high.
    """

    settled = True
    _STATE: tuple[str, ...] = ("lr", "refused")

    def __init__(self, lr_min: float, lr_max: float) -> None:
        self.lr: float | None = None
        self.refused = 0
        self.corrected: float | None = None
        self._bounds = (lr_min, lr_max)

    def plan(self, total_steps: int) -> None:  # noqa: B027  # a rule may have no use for it
        """Takes the length of the run into account."""

    @property
    def watchful(self) -> bool:
        """Whether looks have to come at every step."""
        return False

    @property
    def center(self) -> float | None:
        """The optimal step by the last looks together; None if they have none."""
        return None

    @abstractmethod
    def observe(self, parabola: Parabola, *, decay: float = 1.0, steps: int = 1, first_rate: float = math.inf) -> bool:
        """Updates the rate with a look; returns whether the look was used.

        Args:
            parabola: The loss along an update, with its origin where the update began.
            decay: Factor of a final decay, by which steps are shorter than the rate. Below one the rate only falls.
            steps: Optimizer steps since the last look.
            first_rate: The rate that a rule begins with at most.
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
    """Climbs to the highest learning rate η at which steps still lower the loss, and holds it.

    A look gives the slope n and the curvature d along an update, both over ‖ω‖², on a batch that did not produce the
    update. Over the last eight looks, the mean of n − ηd/2 is by how much a step lowers the loss, its gain, over η.

    - The mean of n − ηd, the slope where a step ends, is positive: a longer step would be better. η grows, more slowly
      near mean(n)/mean(d), and never beyond: by 8 % per step, or by more in a short run, so that a fifth of the run is
      enough for a factor of 333.
    - The gain is negative by four standard errors: η falls by 40 %, and the looks are discarded.
    - One step raises the loss by more than three tenths, and by more than twice what any step raised it by at the last
      looks: it is shortened to the lowest point of its parabola, η falls by 40 %, and the looks are discarded. Where
      data can be separated, gains stay positive up to the very edge.

    At a rate that is held, n/d comes to be η/2 on noisy data, whatever η: curvature and noise adapt to the rate, and
    looks do not tell a good rate from another one any more. So a rate that is settled stays, or falls.

    The first update moves the weights by 1e-3 of their length, or down to a tenth of that where 0.003 n/d is lower:
    starting higher kills ReLU units permanently in some networks. No rate has to be given. The rate is settled once it
    has grown by at most 1 % at each of eight looks in a row, and after 100 steps where the length of the run is
    unknown. Only looks that are not finite are refused.

    Args:
        lr_min: Lower bound of the rate.
        lr_max: Upper bound of the rate.

    >>> from lightning_ifthpo.step_size import Parabola
    >>> rule = AveragedRule()
    >>> used = [rule.observe(Parabola(slope=1.0, curvature=10.0, squared_length=1.0)) for _ in range(100)]
    >>> 0.0 < rule.lr <= 1 / 10  # it grows towards the optimal step, and never beyond
    True
    """

    _STATE = (*Rule._STATE, "_growth", "_probes", "_resting", "_needed", "_climbed", "_longest", "settled")

    def __init__(self, lr_min: float = 1e-8, lr_max: float = 1e3) -> None:
        super().__init__(lr_min, lr_max)
        self.settled = False
        self._growth = _GROWTH
        self._probes: list[list[float]] = []  # slope and curvature of the last looks
        self._resting = 0
        self._needed = _FIRST  # looks before the rate grows
        self._climbed, self._longest = 0, _LONGEST  # steps

    @property
    def watchful(self) -> bool:
        """Whether looks have to come at every step: while the rate has recently been lowered."""
        return len(self._probes) < self._needed

    def plan(self, total_steps: int) -> None:
        """Sets the growth per step; the climb may last until the final decay."""
        self._longest = total_steps
        self._growth = min(max(_GROWTH, _REACH ** (1.0 / (_CLIMB * total_steps))), _FASTEST)

    def observe(self, parabola: Parabola, *, decay: float = 1.0, steps: int = 1, first_rate: float = math.inf) -> bool:
        """Updates the rate with a look; returns whether it was used."""
        self.corrected = None
        self.refused += not parabola.is_finite
        if not parabola.is_finite or parabola.squared_length == 0.0:
            return False
        if self.lr is not None and self._explodes(parabola, self.lr * decay):
            self.corrected = min(max(parabola.optimal_step or 0.0, 0.0), self.lr * decay)
            self._lower()
            return True
        slope, curvature = parabola.slope / parabola.squared_length, parabola.sharpness
        self._probes = [*self._probes[1 - _WINDOW :], [slope, curvature]]
        if self.lr is None:
            self._begin(slope, curvature, first_rate)
        else:
            self._follow(decay, steps)
        return True

    @property
    def center(self) -> float | None:
        """Mean slope over mean curvature of the last looks; None if that is not positive, or there is no look."""
        if not self._probes:
            return None
        slope, curvature = (fmean(values) for values in zip(*self._probes, strict=True))
        return slope / curvature if curvature > 0.0 and slope > 0.0 else None

    def _begin(self, slope: float, curvature: float, first_rate: float) -> None:
        lr = _START * slope / abs(curvature) if slope > 0.0 and curvature != 0.0 else first_rate
        lr = min(max(lr, first_rate / 10.0), first_rate) if math.isfinite(first_rate) else lr
        self.lr = self._within_bounds(lr if math.isfinite(lr) else 0.0)

    def _explodes(self, parabola: Parabola, lr: float) -> bool:
        """Returns whether a step raises the loss by much, and by more than noise did at the last looks."""
        rises = [lr * (lr * curvature / 2 - slope) * parabola.squared_length for slope, curvature in self._probes]
        return -parabola.gain(lr) > max(_RISE * abs(parabola.loss), _UNSEEN * max(rises, default=0.0))

    def _follow(self, decay: float, steps: int) -> None:
        assert self.lr is not None
        lr, before = self.lr * decay, self.lr
        self._climbed += steps
        ends = [slope - lr * curvature for slope, curvature in self._probes]
        gains = [slope - lr * curvature / 2 for slope, curvature in self._probes]
        if len(gains) == _WINDOW and fmean(gains) < -_ERRORS * _standard_error(gains):
            self._lower()
        elif decay == 1.0 and not self.settled and len(ends) >= self._needed and fmean(ends) > 0.0:
            highest = math.inf if self.center is None else self.center
            growth = self._growth ** (steps * (1.0 - lr / highest))
            self.lr = self._within_bounds(min(lr * growth, highest))
        self._resting = 0 if self.lr > 1.01 * before else self._resting + 1
        self.settled |= self._resting >= _WINDOW or self._climbed >= self._longest

    def _lower(self) -> None:
        assert self.lr is not None
        self.lr = self._within_bounds(self.lr * _SHRINKAGE)
        self._probes, self._resting, self._needed = [], -_WINDOW, _WINDOW


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

    def observe(self, parabola: Parabola, *, decay: float = 1.0, steps: int = 1, first_rate: float = math.inf) -> bool:
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
