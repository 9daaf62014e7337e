"""When a callback fires: every n batches, after an optimizer step, within a budget of time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lightning_ifthpo.core.validation import is_number, require_at_least

_FREE_DEMANDS = 8  # which need no budget


class Cadence:
    """Decides after each training batch whether to fire.

    Inside an accumulation window it waits for the optimizer step. With a budget it fires as rarely as needed to keep
    its own time below a fraction of the training time; the first firing comes at once, and counts like all others. With
    a budget the firings depend on the clock, so that a run cannot be repeated exactly.

    Args:
        every_n_batches: Training batches from one firing to the next, at least 1.
        start_after_batches: Training batches before the first of every_n_batches is counted.
        max_overhead: Upper bound of own time over training time; None for no limit.

    Attributes:
        postponed: Number of batches after which it was due but over budget.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        every_n_batches: int,
        start_after_batches: int = 0,
        max_overhead: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        require_at_least("every_n_batches", every_n_batches, 1)
        require_at_least("start_after_batches", start_after_batches, 0)
        if max_overhead is not None and not (is_number(max_overhead) and max_overhead > 0.0):
            raise ValueError(f"expected max_overhead > 0 (0.25 allows 25 % more time) or None, got {max_overhead!r}")
        self._every = every_n_batches
        self._start_after = start_after_batches
        self._max_overhead = max_overhead
        self._clock = clock
        self._batches = 0
        self._since_last = 0
        self._stepped = False
        self._demands = 0
        self._demanded = False
        self._last_cost = 0.0
        self.postponed = 0
        self.begin()

    def begin(self, broadcast: Callable[[bool], bool] = bool) -> None:
        """Starts the clock of the budget when training starts.

        The clocks of processes differ: `broadcast` returns the first process's decision on every process.
        """
        self._broadcast = broadcast
        self._training_began = self._clock()  # moved forward by the time that is not training
        self._own_seconds = 0.0

    @property
    def share_of_time(self) -> float:
        """Own time over own time and training time, since `begin`."""
        total = self._own_seconds + self._clock() - self._training_began
        return self._own_seconds / total if total > 0.0 else 0.0

    @property
    def remedy(self) -> str:
        """What makes firings more frequent."""
        return "lower every_n_batches" if self._max_overhead is None else "raise max_overhead"

    def optimizer_stepped(self) -> None:
        """Records an optimizer step during the current batch."""
        self._stepped = True

    def may_fire(self, *, last_chance: bool = False) -> bool:
        """Returns whether it may fire after the batch that starts now."""
        waited = self._since_last + 1 >= self._every and self._batches >= self._start_after
        return (last_chance or waited) and self._affordable()

    def is_due(self, *, last_chance: bool = False) -> bool:
        """Counts one batch; returns whether to fire after it (on the last chance, after any optimizer step)."""
        self._batches += 1
        if self._batches > self._start_after:
            self._since_last += 1
        stepped, self._stepped = self._stepped, False
        if not (stepped and (last_chance or self._demanded or self._since_last >= self._every)):
            return False
        is_free, self._demanded = self._demanded and self._demands <= _FREE_DEMANDS, False
        affordable = is_free or self._affordable()
        self.postponed += not affordable and self._since_last >= self._every
        return affordable

    def demand(self) -> None:
        """Makes it due after the next optimizer step, the first few times whatever the budget."""
        self._demands += not self._demanded
        self._demanded = True

    def postpone(self) -> None:
        """Makes it due after the next batch, because it could not fire on this one."""
        self._since_last, self._stepped = self._every, True

    @contextmanager
    def firing(self, synchronize: Callable[[], None]) -> Iterator[None]:
        """Counts the time of the block as own time."""
        self._since_last = 0
        before = self._training_began
        try:
            with self.off_budget(synchronize):
                yield
        finally:
            self._last_cost = self._training_began - before
            self._own_seconds += self._last_cost

    @contextmanager
    def off_budget(self, synchronize: Callable[[], None]) -> Iterator[None]:
        """Leaves the block out of the training time; calls `synchronize` on both sides of it if there is a budget."""
        began = self._now(synchronize)
        try:
            yield
        finally:
            self._training_began += self._now(synchronize) - began

    def state_dict(self) -> dict[str, int]:
        """Returns the counters, as plain numbers."""
        return {"batches": self._batches, "since_last": self._since_last, "demands": self._demands}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Restores the counters."""
        self._batches, self._since_last, self._demands = state["batches"], state["since_last"], state.get("demands", 0)

    def _affordable(self) -> bool:
        if self._max_overhead is None:
            return True
        training = self._clock() - self._training_began
        return self._broadcast(self._own_seconds + self._last_cost <= self._max_overhead * training)

    def _now(self, synchronize: Callable[[], None]) -> float:
        if self._max_overhead is not None:
            synchronize()
        return self._clock()
