"""A budget of time: own work may take a fraction of the time of a run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Clock:
    """Measures own work, and says whether more of it is affordable.

    Args:
        share: Largest fraction of the time since the start that own work may take.
        free: Number of pieces of work that are affordable in any case.
        expected: Seconds that the first piece of work is expected to take.
        clock: The time in seconds.

    Attributes:
        seconds: Time of own work.
        last_cost: Time of the last piece of it, or the expected one of the first.
    """

    def __init__(
        self, share: float, *, free: int = 0, expected: float = 0.0, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._share, self._free, self._clock = share, free, clock
        self._began = clock()
        self.seconds, self.last_cost = 0.0, expected

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return self._clock() - self._began

    def affords(self) -> bool:
        """Returns whether a further piece of work, as long as the last one, is within the budget."""
        return self._free > 0 or self.seconds + self.last_cost <= self._share * self.elapsed

    @contextmanager
    def working(self) -> Iterator[None]:
        """Counts the time of the block as own work."""
        began = self._clock()
        try:
            yield
        finally:
            self.last_cost = self._clock() - began
            self.seconds += self.last_cost
            self._free -= 1
