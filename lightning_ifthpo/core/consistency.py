"""A check that a loss changes as its gradient says."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_ifthpo.core.loss import Loss
from lightning_ifthpo.core.step_length import relative_step, step_along

# Relative difference of the slopes that is more than curvature, kinks and rounding. Over the shorter step healthy
# networks in float32 had at most .001 before training and .04 after it; ten ReLU layers near a minimum had 1.7 over the
# longer step and .28 over the shorter one.
_TOLERANCE = 0.1


def follows_its_gradient(loss: Loss, gradient: Tensor | None = None) -> bool:
    """Returns whether the slope of a loss along its gradient, by its values, is the squared length of the gradient.

    It is not where a part of the loss is detached, such as the advantage of a policy gradient or the target of temporal
    differences, nor where a backward pass is not the derivative, such as that of a straight-through estimator or of a
    gradient reversal. Curvature and kinks make slopes by values differ too, but less over a tenth of the step; a
    difference that falls by half or more is laid to them.

    Args:
        loss: The loss, with parameters w, together [n].
        gradient: Its gradient, [n], if it is known.

    Cost: one gradient unless it is known, and two forward passes, four if the slopes differ.
    """
    gradient = loss.gradient() if gradient is None else gradient
    slope = float(gradient @ gradient)
    if slope == 0.0 or not math.isfinite(slope):
        return True
    direction = loss.space.split(gradient)
    dtype = max((tensor.dtype for tensor in loss.parameters), key=lambda dtype: torch.finfo(dtype).eps)
    step = relative_step(dtype) * step_along(direction, loss.parameters)
    with loss.along(direction) as at:

        def error(alpha: float) -> float:
            ahead, behind = (float(loss.combine(at(sign * alpha))) for sign in (1.0, -1.0))
            # a loss is a sum of many rounded terms: some units in the last place of each value
            rounding = 8.0 * torch.finfo(dtype).eps * max(abs(ahead), abs(behind)) / alpha
            return abs((ahead - behind) / (2.0 * alpha) - slope) - rounding

        over_long = error(step)
        if not over_long > _TOLERANCE * slope:  # a NaN says nothing
            return True
        over_short = error(step / 10.0)
    return not (over_short > _TOLERANCE * slope and over_short > over_long / 2.0)
