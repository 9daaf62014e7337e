"""When a run is about to diverge."""

from __future__ import annotations

import math
from statistics import median
from typing import Any

from lightning_ifthpo.step_size.critical import CriticalStep

# Chosen on splits 0 to 3 of eight workloads: 66 of 68 runs that diverge have an alarm before the loss is ten times the
# first one, and none of 64 good runs has one. See examples/experiments/alarms.py for other splits.
_NEAR = 0.95  # ratio to the edge of stability
_GROWTH = 2.0  # of the loss, over its median at the last steps
_WINDOW = 10  # steps


class DivergenceWatch:
    """Tells when a run is about to diverge: a step is at the edge of stability, and it is the first, or losses grow.

    Either alone is harmless. On noisy data the loss of a batch may be several times that of another one, and full
    batches train at the edge. After the first step an update that raises the loss from its beginning is no sign:
    momentum does so on batches that are unlike the others.

    Attributes:
        alarms: Number of alarms.

    >>> watch = DivergenceWatch()
    >>> [watch.observe(loss) for loss in (1.0, 0.8, 1.1, 1.5, 2.5)]  # the first one, and one that is twice the median
    [True, False, False, False, True]
    >>> watch.judge(CriticalStep(step=0.5, is_bound=False, evaluations=4))
    'the loss has grown from 1.05 to 2.5'
    """

    def __init__(self) -> None:
        self.alarms = 0
        self._losses: list[float] = []
        self._suspicion = ""
        self._is_first = True

    def observe(self, loss: float) -> bool:
        """Takes note of the loss before a step; returns whether that step is suspicious, as the first one is."""
        usual = median(self._losses) if self._losses else loss
        self._is_first = not self._losses
        self._suspicion = "it is the first step" if self._is_first else ""
        if not loss - usual <= (_GROWTH - 1.0) * abs(usual):
            self._suspicion = f"the loss has grown from {usual:.3g} to {loss:.3g}"
        if math.isfinite(loss):
            self._losses = [*self._losses[1 - _WINDOW :], loss]
        return bool(self._suspicion)

    def judge(self, found: CriticalStep) -> str:
        """Returns why the run is about to diverge, by the critical step of the last update, and counts the alarm.

        The answer is empty if the run is not about to diverge.
        """
        is_sign = self._is_first or not found.is_bound
        if not (self._suspicion and is_sign and found.step * _NEAR <= 1.0):
            return ""
        self.alarms += 1
        return self._suspicion

    def state_dict(self) -> dict[str, Any]:
        """Returns everything that resuming needs, as plain numbers."""
        return {"alarms": self.alarms, "losses": self._losses}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores a result of `state_dict`."""
        self.alarms, self._losses = state_dict["alarms"], state_dict["losses"]
