"""A check that a loss changes as its gradient says."""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from lightning_ifthpo.core.loss import Loss
from lightning_ifthpo.core.step_length import relative_step, step_along

# Relative difference of the slopes that is a fault, before rounding. In seven healthy networks with ReLU and BatchNorm
# in float32 it was at most .08 over the first step and .03 over the second. It was .11 with a gradient reversal, and .6
# to 3 with detached parts, straight-through estimators and hooks that scale.
_TOLERANCE = 0.05
# Estimated rounding of the losses over their change, for each step. Short steps cross no kinks of deep ReLU networks.
# With BatchNorm the estimate of rounding was ten times too small, and rounding matters less on long steps.
_RESOLUTIONS = (1e-3, 1e-4, 5e-3, 1e-5, 1e-6)
_UNDERESTIMATE = 10.0
# What is left of the error at a step sixteen times shorter. It was all of it, to .02, with faults, more than all at a
# jump, and at most .6 with BatchNorm behind weights so small that no step was short enough.
_SHORTER, _LEFT = 16.0, 0.8


def follows_its_gradient(loss: Loss, gradient: Tensor | None = None, here: Tensor | None = None) -> bool:
    """Returns whether the slope of a loss along its gradient, by its values, is the squared length of the gradient.

    It is not where a part of the loss is detached, such as the advantage of a policy gradient or the target of temporal
    differences, nor where a backward pass is not the derivative, such as that of a straight-through estimator or of a
    gradient reversal. Several steps are tried, and one that agrees is enough: kinks and rounding spoil some of them, a
    fault spoils all. Where the error still falls at the shortest step, the loss is too curved to say anything.

    Args:
        loss: The loss, with parameters w, together [n].
        gradient: Its gradient, [n], if it is known.
        here: Its value, a scalar, if it is known.

    Cost: one gradient and a forward pass unless they are known, and a forward pass; at most twelve if the slopes
    differ.
    """
    gradient = loss.gradient() if gradient is None else gradient
    slope = float(gradient @ gradient)
    if slope == 0.0 or not math.isfinite(slope):
        return True
    direction = loss.space.split(gradient)
    dtype = loss.space.coarsest_dtype
    longest = relative_step(dtype) * step_along(direction, loss.parameters)
    with loss.along(direction) as at:

        @cache
        def value(alpha: float) -> float:
            return float(loss.combine(at(alpha)))

        # A loss is a sum of many rounded terms: some units in the last place of its value.
        start = value(0.0) if here is None else float(here)
        rounding = 8.0 * torch.finfo(dtype).eps * abs(start) / slope
        steps = list(dict.fromkeys(min(longest, rounding / resolution) or longest for resolution in _RESOLUTIONS))
        # a step on one side is enough for most losses
        one_sided = abs((value(steps[0]) - start) / steps[0] / slope - 1.0)
        if one_sided <= _TOLERANCE + 2.0 * _UNDERESTIMATE * rounding / steps[0]:
            return True

        def difference(step: float) -> float:  # relative, to the slope that the gradient says
            return (value(step) - value(-step)) / (2.0 * step) / slope - 1.0

        shortest, error = math.inf, 0.0
        for step in steps:
            relative = abs(difference(step))
            if not relative > _TOLERANCE + _UNDERESTIMATE * rounding / step:  # a NaN says nothing
                return True
            shortest, error = min((shortest, error), (step, relative))
        return abs(difference(shortest / _SHORTER)) < _LEFT * error
