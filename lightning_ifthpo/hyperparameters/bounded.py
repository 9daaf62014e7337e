"""Values in an interval, as a function of unbounded hyperparameters λ."""

from __future__ import annotations

import math

from torch import Tensor, nn

from lightning_ifthpo.core.validation import is_ascending

_AT_BOUND = 0.99  # of the maximum, where the derivative is 4 % of the largest one


class Bounded(nn.Module):
    """Base class of modules with values maximum · σ(λ), all equal to `initial` at the start.

    Raises:
        ValueError: Unless 0 < initial < maximum <= limit, with a finite maximum.
    """

    unit = 1.0  # λ is a logarithm, or nearly so

    def __init__(self, initial: float, maximum: float, limit: float = math.inf) -> None:
        require_inside(initial, maximum, limit)
        super().__init__()
        self.maximum = maximum

    def extra_repr(self) -> str:
        """Returns the upper bound, for the module's repr."""
        return f"maximum={self.maximum:g}"

    def is_at_bound(self, value: float) -> bool:
        """Returns whether a value is so near to the maximum that steps hardly move it."""
        return value > _AT_BOUND * self.maximum

    def _logit(self, value: float) -> float:
        return math.log(value / (self.maximum - value))

    def _value(self, logits: Tensor) -> Tensor:
        return between(logits, 0.0, self.maximum)


def require_inside(initial: float, maximum: float, limit: float = math.inf) -> None:
    """Raises ValueError unless 0 < initial < maximum <= limit, with a finite maximum."""
    if not is_ascending(0.0, initial, maximum, math.inf) or maximum > limit:
        bound = "< inf" if limit == math.inf else f"<= {limit:g}"
        raise ValueError(f"expected 0 < initial < maximum {bound}, got initial={initial!r} and maximum={maximum!r}")


def between(logits: Tensor, lowest: float, highest: float) -> Tensor:
    """Returns lowest + (highest − lowest) σ(λ), shaped like the logits λ; its derivative is finite for every λ."""
    values = (highest - lowest) * logits.sigmoid()
    return lowest + values if lowest else values
