"""The longest step along an update that does not raise a loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_ifthpo.core.loss import Loss
from lightning_ifthpo.core.space import full_tensor
from lightning_ifthpo.core.validation import is_ascending, require_at_least

_STRETCH = 2.0  # factor between the first two steps that are tried
_REACH = 16.0  # factor to a longer or a shorter step where no line shows how far to go
_FAR = 1e3  # factor from one beyond which a result is no guess for the next step
_TRUST = 1e4  # largest factor to a longer or a shorter step to which a line is followed


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
        loss = loss_at(step)
        rise = loss - start if math.isfinite(loss) else math.inf
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
    high = min((step for step, rise in tried if rise > 0.0), default=math.inf)
    return max((step for step, _ in tried if step < high), default=0.0), high


def _next_step(tried: list[tuple[float, float]]) -> float:
    """Returns where the line through the last two mean rises is zero, if that is inside the bracket."""
    (step, rise), (low, high) = tried[-1], _bracket(tried)
    if len(tried) == 1 and math.isfinite(rise):
        return step / _STRETCH if rise > 0.0 else step * _STRETCH
    if len(tried) > 1:
        before, earlier = tried[-2]
        slope = (rise - earlier) / (step - before)
        zero = step - rise / slope if 0.0 < slope < math.inf else math.nan
        if (low or high / _TRUST) <= zero <= min(high, (low or high) * _TRUST):
            return zero
    if high == math.inf:
        return low * _REACH
    return math.sqrt(low * high) if low else high / _REACH


class CriticalTracker:
    """Measures the critical step along the updates of a run, each time from the last result.

    Args:
        max_evaluations: Largest number of losses for a measurement, at least 3.
        rtol: Relative error of the step to stop at.

    Raises:
        ValueError: If an argument is out of range.

    >>> weight = torch.tensor([1.0], requires_grad=True)
    >>> tracker = CriticalTracker()
    >>> tracker.before_update([weight])
    >>> with torch.no_grad():
    ...     _ = weight.sub_(0.5)  # halfway to the minimum
    >>> round(tracker.measure(Loss(lambda: weight.square().sum(), [weight])).step, 3)
    4.0
    """

    def __init__(self, *, max_evaluations: int = 6, rtol: float = 1e-2) -> None:
        require_at_least("max_evaluations", max_evaluations, 3)
        if not is_ascending(0.0, rtol, math.inf):
            raise ValueError(f"expected 0 < rtol < infinity, got {rtol!r}")
        self.max_evaluations = max_evaluations
        self.rtol = rtol
        self.measurements = 0
        self._guess = 1.0
        self._before: list[Tensor] = []

    @property
    def is_ready(self) -> bool:
        """Whether the weights before an update are known."""
        return bool(self._before)

    def before_update(self, weights: Sequence[Tensor]) -> None:
        """Keeps copies of the weights, from which the next update begins; none to forget them."""
        self._before = [full_tensor(weight).detach().clone() for weight in weights]

    def measure(self, loss: Loss) -> CriticalStep | None:
        """Returns the critical step along what the loss's parameters have changed by; None if they have not changed.

        It needs three copies of the parameters, and no graph. The parameters are restored bit for bit.
        """
        pairs = list(zip(self._before, loss.parameters, strict=True))
        if all(torch.equal(before, weight) for before, weight in pairs):
            return None
        back, self._before = [before.sub_(weight.detach()) for before, weight in pairs], []
        with loss.along(back, graph=False) as at:
            found = critical_step(
                lambda step: float(loss.combine(at(1.0 - step))),
                guess=self._guess,
                rtol=self.rtol,
                max_evaluations=self.max_evaluations,
                dtype=loss.space.coarsest_dtype,
            )
        self.measurements += 1
        is_far = not 1.0 / _FAR < found.step < _FAR
        self._guess = 1.0 if found.is_bound or is_far else found.step
        return found

    def state_dict(self) -> dict[str, Any]:
        """Returns everything that resuming needs, as plain numbers."""
        return {"measurements": self.measurements, "guess": self._guess}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores a result of `state_dict`."""
        self.measurements, self._guess = state_dict["measurements"], state_dict["guess"]
