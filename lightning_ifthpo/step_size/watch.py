"""A watch on gradients between looks, which costs no forward pass."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn.utils import get_total_norm

_RECORDS, _AMONG = 3, 32  # records in a row that are an alarm, each longer than so many gradients before it


class GradientWatch:
    """Raises an alarm where gradients grow step after step, as where descent begins to diverge.

    The third gradient in a row that is longer than all of the last 32 is an alarm, which lasts until one is not longer.
    In noise that happens once in 39,000 steps (33 · 34 · 35), and costs a look.

    >>> import torch
    >>> watch, alarms = GradientWatch(), []
    >>> for length in (1.0, 2.0, 4.0, 8.0, 7.0):
    ...     watch.observe([torch.tensor([length])])
    ...     alarms.append(watch.is_alarmed)
    >>> alarms
    [False, False, False, True, False]
    """

    def __init__(self) -> None:
        self._records, self._lengths = 0, deque[float](maxlen=_AMONG)

    @property
    def is_alarmed(self) -> bool:
        """Whether the gradient has grown step after step."""
        return self._records >= _RECORDS

    def observe(self, gradients: Sequence[Tensor]) -> None:
        """Takes note of the gradients of a step; one norm, which waits for the device."""
        dense = [gradient.coalesce().values() if gradient.is_sparse else gradient for gradient in gradients]
        norm: Any = get_total_norm(dense)
        length = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        self._records = self._records + 1 if length > max(self._lengths, default=math.inf) else 0
        if math.isfinite(length):
            self._lengths.append(length)

    def state_dict(self) -> dict[str, Any]:
        """Returns the state, as plain numbers."""
        return {"records": self._records, "lengths": list(self._lengths)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from a state."""
        self._records, self._lengths = state["records"], deque(state["lengths"], maxlen=_AMONG)
