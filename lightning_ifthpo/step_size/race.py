"""Learning rates in a race: which ones to try, and which one wins."""

from __future__ import annotations

import math
from typing import NamedTuple

_FIRST = (2, 0, -2, -4, -6)  # powers of two times the anchor: from four times to 1/64 of it, by factors of four
_FURTHER = 4  # trials beyond the first ones, at most, by factors of four each: another factor of 256


class RateTrial(NamedTuple):
    """A rate, and the loss that a trial with it ended with; infinite if the trial diverged.

    >>> min(RateTrial(0.1, 1.2), RateTrial(0.4, math.inf), key=lambda trial: trial.loss).lr
    0.1
    """

    lr: float
    loss: float


class RateRace:
    """Chooses rates to try, each by the losses of those before, and the winner.

    Rates from four times the anchor to 1/64 of it come first. While the lowest or the highest one is the best, a rate
    beyond it is tried, four times at most. Then half and twice the best are tried.

    Args:
        anchor: A rate that is right within a factor of four upwards and 64 downwards, such as slope / curvature.
        highest: No higher rate is tried, except for the anchor. Where a network learns nothing at first, as a recurrent
            one at the level of guessing, a short race is won by noise, and rates without a bound would win.

    >>> race = RateRace(1.0)
    >>> while (rate := race.next_rate) is not None:
    ...     race.observe(abs(math.log(rate / 0.1)))
    >>> race.winner.lr, len(race.trials)
    (0.125, 7)
    """

    def __init__(self, anchor: float, highest: float = math.inf) -> None:
        self._anchor = anchor
        self._most = max(0, math.floor(math.log2(highest / anchor))) if highest < math.inf else 1024
        self._losses: dict[int, float] = {}  # by the power of two

    @property
    def next_rate(self) -> float | None:
        """The rate to try next; None if the race is over."""
        power = self._next_power
        return None if power is None else math.ldexp(self._anchor, power)

    def observe(self, loss: float) -> None:
        """Takes the loss that the trial with `next_rate` ended with; NaN and infinity count as a lost trial."""
        assert self._next_power is not None, "the race is over"
        self._losses[self._next_power] = loss if math.isfinite(loss) else math.inf

    @property
    def trials(self) -> tuple[RateTrial, ...]:
        """The trials so far, sorted by the rate."""
        return tuple(RateTrial(math.ldexp(self._anchor, power), self._losses[power]) for power in sorted(self._losses))

    @property
    def winner(self) -> RateTrial:
        """The trial with the lowest loss, of the lowest rate among several; at least one trial must have been made."""
        return min(self.trials, key=lambda trial: trial.loss)

    @property
    def is_open(self) -> bool:
        """Whether the winner is the lowest or the highest rate that was tried, and rates beyond it are allowed."""
        best = _lowest(self._losses)
        return best == min(self._losses) or (best == max(self._losses) and best < self._most)

    @property
    def _next_power(self) -> int | None:
        first = [power for power in _FIRST if power <= self._most]
        left = [power for power in first if power not in self._losses]
        if left:
            return left[0]
        coarse = {power: loss for power, loss in self._losses.items() if power % 2 == 0}  # by factors of four
        best, low, high = _lowest(coarse), min(coarse), max(coarse)
        lost = math.isinf(coarse[best])
        if len(self._losses) == len(coarse) < len(first) + _FURTHER:
            if lost or best == low:
                return low - 2
            if best == high and high + 2 <= self._most:
                return high + 2
        beside = [power for power in (best - 1, best + 1) if power <= self._most and power not in self._losses]
        return None if lost or not beside else beside[0]


def _lowest(losses: dict[int, float]) -> int:
    """Returns the power with the lowest loss, the lowest one among several."""
    return min(sorted(losses), key=losses.__getitem__)
