"""How far to move weights for a difference quotient: in the unit of the weights that the derivative sees."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_ifthpo.core.vectors import length, overlap


def relative_step(dtype: torch.dtype, *, second: bool = False) -> float:
    """Returns the relative step of a central difference: cbrt(machine epsilon), 6e-6 in float64 and 5e-3 in float32.

    The truncation error is the square of the step, and the rounding error is epsilon over the step; they are equal
    there. For a second difference the rounding error is epsilon over the square of the step, which gives epsilon^(1/4),
    1e-4 in float64 and .02 in float32.
    """
    return float(torch.finfo(dtype).eps ** (1 / 4 if second else 1 / 3))


def natural_step(v: Tensor, w: Tensor, gradient: Tensor, loss: float) -> float:
    """Returns the α > 0 at which αv is as long as the weights w, for a nonzero v: [n]; 1/α is a norm of v.

    Only weights with a nonzero gradient count, because a loss does not use the others: α is ‖w‖ / ‖v‖ over these. It is
    at most ‖w‖ / ‖v‖ over all weights, so that a v outside of the used weights has a length too. Weights of zero have
    no length. There α is the step at which the slope would change the loss by itself, |L| / (‖∇L‖ ‖v‖), or 1 / ‖v‖
    without a slope. Another unit of the weights, or of the loss, changes αv by that unit only.
    """
    used, extent_of_v = gradient != 0.0, length(v)
    moved, extent = length(v * used), length(w * used)
    least = float(torch.finfo(w.dtype).tiny ** 0.5)  # products with shorter vectors may be rounded to zero
    if moved == 0.0:
        moved, extent = extent_of_v, length(w)
    if extent <= least:
        step = abs(loss) / length(gradient) if used.any() else 0.0
        return (step if step > least else 1.0) / moved
    return min(extent / moved, length(w) / extent_of_v)


def step_along(direction: Sequence[Tensor | None], weights: Sequence[Tensor]) -> float:
    """Returns the α at which α · direction is as long as the weights along it, Σ|vᵢwᵢ| / Σvᵢ²; 1 / ‖v‖ if that is 0.

    Weights count as far as the direction moves them: those that it leaves alone have no effect.
    """
    pairs = [(v.detach(), w.detach()) for v, w in zip(direction, weights, strict=True) if v is not None]
    squared = sum(length(v) ** 2 for v, _ in pairs)
    return float(sum(overlap(v, w) for v, w in pairs) / squared or squared**-0.5)
