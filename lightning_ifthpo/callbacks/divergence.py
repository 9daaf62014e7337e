"""When a run is about to diverge."""

from __future__ import annotations

from typing import Any

from lightning_ifthpo.step_size.critical import CriticalStep

# Chosen on splits 0 to 3 of eight workloads: 66 of 68 runs that diverge have an alarm before the loss is ten times the
# first one, and none of 64 good runs has one. See examples/experiments/alarms.py for other splits.
_NEAR = 0.95  # ratio to the edge of stability
_GROWTH = 2.0  # of the loss, over its least value at the last batches
_WINDOW = 10  # batches


class DivergenceWatch:
    """Tells when a run is about to diverge: a step is at the edge of stability, and it is the first, or losses grow.

    Either alone is harmless. On noisy data the loss of a batch may be several times that of another one, and full
    batches train at the edge.

    Attributes:
        alarms: Number of alarms.

    >>> watch = DivergenceWatch()
    >>> [watch.observe(loss) for loss in (1.0, 0.8, 1.1, 1.5, 2.5)]  # the first one, and one that is three times 0.8
    [True, False, False, False, True]
    >>> watch.judge(CriticalStep(step=0.5, is_bound=False, evaluations=4))
    'the loss has grown from 0.8 to 2.5'
    """

    def __init__(self) -> None:
        self.alarms = 0
        self._losses: list[float] = []
        self._suspicion = ""

    def observe(self, loss: float) -> bool:
        """Takes note of a batch's loss before its step; returns whether that is suspicious, as the first step is."""
        least = min(self._losses, default=loss)
        self._suspicion = "" if self._losses else "it is the first step"
        if loss - least > (_GROWTH - 1.0) * abs(least):
            self._suspicion = f"the loss has grown from {least:.3g} to {loss:.3g}"
        self._losses = [*self._losses[1 - _WINDOW :], loss]
        return bool(self._suspicion)

    def judge(self, found: CriticalStep) -> str:
        """Returns why the run is about to diverge, by the critical step of the last batch, and counts the alarm.

        The answer is empty if the run is not about to diverge.
        """
        if not self._suspicion or found.step * _NEAR > 1.0:
            return ""
        self.alarms += 1
        return self._suspicion

    def state_dict(self) -> dict[str, Any]:
        """Returns everything that resuming needs, as plain numbers."""
        return {"alarms": self.alarms, "losses": self._losses}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores a result of `state_dict`."""
        self.alarms, self._losses = state_dict["alarms"], state_dict["losses"]
