"""The longest step along an update that does not raise a loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

_STRETCH = 2.0  # between the first two steps that are tried
_REACH = 16.0  # at most, between a step that was tried and a longer or a shorter one


@dataclass(frozen=True)
class CriticalStep:
    """The longest step along an update that does not raise a loss; the update itself is a step of one.

    Attributes:
        step: The step, positive.
        is_bound: Whether all steps that were tried raise the loss, or none of them: the critical step is then shorter,
            or longer, than this one. Along an update that raises the loss from its beginning there is none.
        evaluations: Number of losses that were computed.
    """

    step: float
    is_bound: bool
    evaluations: int


def critical_step(
    loss_at: Callable[[float], float],
    *,
    guess: float = 1.0,
    rtol: float = 0.01,
    max_evaluations: int = 6,
    dtype: torch.dtype = torch.float32,
) -> CriticalStep:
    """Returns the longest step along an update that does not raise the loss (Kalra et al. 2026, arXiv 2601.16979).

    On a quadratic it is 2 · slope / curvature. It is one where an optimizer becomes unstable, because each step then
    leads to the mirror image of the weights, with the same loss; this holds for any optimizer. The search needs no
    derivative. The mean rise (L(s) − L(0)) / s of a quadratic is a straight line in s, so that secants find its zero.

    Args:
        loss_at: Returns the loss at w + s · Δ for a step s ≥ 0, with the update Δ.
        guess: The step to try first, such as the last result.
        rtol: Relative error of the step to stop at.
        max_evaluations: Largest number of losses to compute, at least 3.
        dtype: The dtype in which the losses are computed. A rise within its rounding counts as none.

    Raises:
        FloatingPointError: If L(0) is not finite.

    >>> found = critical_step(lambda s: (1 - s) ** 2)  # it falls to zero at s = 1, and has risen again at s = 2
    >>> round(found.step, 3), found.evaluations
    (2.0, 3)
    """
    start = loss_at(0.0)
    if not math.isfinite(start):
        raise FloatingPointError(f"the loss before the update is {start}, and no step can be compared with it")
    rounding = 2.0 * torch.finfo(dtype).eps * abs(start)
    tried: list[tuple[float, float]] = []  # steps, and the mean rise along each
    step, is_found = guess, False
    while len(tried) < max_evaluations - 1 and not is_found:
        rise = loss_at(step) - start
        tried.append((step, 0.0 if abs(rise) <= rounding else rise / step))
        step = _next_step(tried)
        is_found = abs(step / tried[-1][0] - 1.0) <= rtol
    low, high = _bracket(tried)
    is_bound = not is_found and (low == 0.0 or high == math.inf)
    return CriticalStep((low or high) if is_bound else step, is_bound, len(tried) + 1)


def _bracket(tried: list[tuple[float, float]]) -> tuple[float, float]:
    """Returns the longest step that does not raise the loss, or zero, and the shortest one that does, or infinity.

    If a step does not raise the loss beyond one that does, it is left out.
    """
    high = min((step for step, rise in tried if not rise <= 0.0), default=math.inf)
    return max((step for step, _ in tried if step < high), default=0.0), high


def _next_step(tried: list[tuple[float, float]]) -> float:
    """Returns where the line through the last two mean rises is zero, if that is inside the bracket."""
    (step, rise), (low, high) = tried[-1], _bracket(tried)
    is_open = low == 0.0 or high == math.inf
    if len(tried) == 1 and math.isfinite(rise):
        return step / _STRETCH if rise > 0.0 else step * _STRETCH
    far = low * _REACH if high == math.inf else high / _REACH
    least, most = (low or far), (far if high == math.inf else high)
    zero = math.nan
    if len(tried) > 1:
        before, earlier = tried[-2]
        slope = (rise - earlier) / (step - before)
        zero = step - rise / slope if slope > 0.0 else math.nan
    if least <= zero <= most:
        return zero
    return far if is_open else math.sqrt(low * high)
