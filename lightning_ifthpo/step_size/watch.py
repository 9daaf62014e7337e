"""A watch on gradients between looks, which costs no forward pass."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn.utils import get_total_norm

_RISES = (3, 8)  # rises in a row that are an alarm: with a growth of 2.5 in all, and with any growth
_GROWTH = 2.5


class GradientWatch:
    """Raises an alarm where gradients grow step after step, as where descent begins to diverge.

    In noise three rises in a row with a growth of 2.5 are rare, and eight rises in a row happen once in 40,000 steps.
    An alarm costs a look. It lasts until the gradient has shrunk.

    >>> import torch
    >>> watch, alarms = GradientWatch(), []
    >>> for length in (1.0, 2.0, 4.0, 8.0, 7.0):
    ...     watch.observe([torch.tensor([length])])
    ...     alarms.append(watch.is_alarmed)
    >>> alarms
    [False, False, False, True, False]
    """

    def __init__(self) -> None:
        self._rises, self._growth, self._last = 0, 1.0, math.inf

    @property
    def is_alarmed(self) -> bool:
        """Whether the gradient has grown step after step."""
        few, many = _RISES
        return self._rises >= many or (self._rises >= few and self._growth >= _GROWTH)

    def observe(self, gradients: Sequence[Tensor]) -> None:
        """Takes note of the gradients of a step; one norm, which waits for the device."""
        dense = [gradient.coalesce().values() if gradient.is_sparse else gradient for gradient in gradients]
        norm: Any = get_total_norm(dense)
        length = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        if length > self._last:
            self._rises, self._growth = self._rises + 1, self._growth * length / max(self._last, 1e-300)
        else:
            self._rises, self._growth = 0, 1.0
        self._last = length

    def state_dict(self) -> dict[str, Any]:
        """Returns the state, as plain numbers."""
        return {"rises": self._rises, "growth": self._growth, "last": self._last}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from a state."""
        self._rises, self._growth, self._last = state["rises"], state["growth"], state["last"]
