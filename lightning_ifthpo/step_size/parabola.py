"""The loss along an update as a parabola, from derivatives or from losses."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache

import torch
from torch import Tensor

from lightning_ifthpo.core.loss import Loss, LossFunction, as_loss
from lightning_ifthpo.core.step_length import relative_step, step_along
from lightning_ifthpo.core.vectors import length as vector_length
from lightning_ifthpo.curvature import FiniteDifferenceOperator
from lightning_ifthpo.curvature.gauss_newton import forward_slope_and_curvature
from lightning_ifthpo.curvature.kinds import LossCurvature, curvature_operator


@dataclass(frozen=True)
class Parabola:
    """A loss along −ω, to second order: L(w − αω) ≈ L(w) − α slope + α²/2 curvature.

    Attributes:
        slope: ∇L·ω; positive where a step along −ω begins to lower the loss.
        curvature: ωᵀHω.
        squared_length: ‖ω‖².
        loss: L(w), or NaN if it is not known.

    >>> Parabola(slope=2.0, curvature=4.0, squared_length=1.0).optimal_step
    0.5
    """

    slope: float
    curvature: float
    squared_length: float
    loss: float = math.nan

    @property
    def optimal_step(self) -> float | None:
        """The lowest point α* = slope / curvature (Bu and Xu 2024, eq. 3.1); None if the curvature is not positive."""
        return self.slope / self.curvature if self.curvature > 0.0 and math.isfinite(self.slope) else None

    def at(self, step: float) -> Parabola:
        """Returns the same parabola with its origin at w − step · ω."""
        return Parabola(
            self.slope - step * self.curvature, self.curvature, self.squared_length, self.loss - self.gain(step)
        )

    def gain(self, step: float) -> float:
        """Returns by how much a step lowers the loss, L(w) − L(w − step · ω)."""
        return step * self.slope - step**2 / 2 * self.curvature

    def along(self, length: float) -> Parabola:
        """Returns the same parabola along an update of the same direction and another length ‖ω‖ > 0."""
        ratio = length / math.sqrt(self.squared_length)
        return Parabola(self.slope * ratio, self.curvature * ratio**2, length**2, self.loss)

    @property
    def sharpness(self) -> float:
        """Directional sharpness ωᵀHω / ‖ω‖², in loss / parameter²; zero for a zero direction."""
        return self.curvature / self.squared_length if self.squared_length else 0.0

    @property
    def is_finite(self) -> bool:
        """Whether slope, curvature and length are finite."""
        return all(map(math.isfinite, (self.slope, self.curvature, self.squared_length)))


def exact_parabola(
    loss: LossFunction | Loss,
    parameters: Sequence[Tensor],
    direction: Sequence[Tensor | None],
    *,
    curvature: LossCurvature = "hessian",
    step: float = 0.0,
) -> Parabola:
    """Returns the parabola with the exact slope, and the curvature by one product.

    Args:
        loss: Callable without arguments that returns the scalar loss, or (loss, outputs); or a `Loss`.
        parameters: The tensors w.
        direction: ω, shaped like the parameters; `None` for zeros.
        curvature: "hessian", exact; "gauss_newton", never negative for a convex loss of the outputs;
            "finite_difference", from gradients on either side of w.
        step: The α of finite differences at w ± αω; by default, and if rounding exceeds that difference, a short one.

    Cost: for the Hessian one forward pass, one differentiable gradient and one product. For Gauss–Newton a forward pass
    in forward mode, or the cost of the Hessian if an operation has no derivative in forward mode. By finite differences
    three gradients. Over several processes, one collective of two numbers.

    >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> exact_parabola(lambda: (w**2).sum(), [w], [2 * w]).optimal_step  # gradient descent on ‖w‖²
    0.5
    """
    whole = as_loss(loss, parameters)
    omega = whole.space.flatten(direction)
    pair = torch.stack(_slope_and_curvature(whole.own_share(), omega, curvature, step))
    slope, curved = (pair if whole.all_reduce is None else whole.all_reduce(pair)).tolist()
    return Parabola(slope, curved, float(omega @ omega))


def three_point_parabola(
    loss: LossFunction | Loss,
    parameters: Sequence[Tensor],
    direction: Sequence[Tensor | None],
    *,
    step: float = 0.0,
    last: Parabola | None = None,
) -> Parabola:
    """Returns slope and curvature as differences of three losses, L(w + αω), L(w) and L(w − αω).

    It needs no derivative, and sees kinks at the scale of a step. All three losses draw the same random numbers. A
    curvature that is not larger than rounding is returned as zero.

    Args:
        loss: Callable without arguments that returns the scalar loss, or (loss, outputs); or a `Loss`.
        parameters: The tensors w.
        direction: ω, shaped like the parameters; `None` for zeros.
        step: α. If the second difference drowns in rounding, (machine epsilon)^(1/4) of the weights along ω is used
            instead, if that is longer; see `step_along`. If α is zero, steps are tried from that length on, longer ones
            while the second difference drowns, and shorter ones while it is large beside the loss.
        last: The parabola of an earlier, similar update, if there is one. It shows in advance whether the second
            difference of α would drown, which saves two forward passes.

    Cost: three forward passes, two more for each further step, at most six steps; one extra copy of the parameters.

    >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> parabola = three_point_parabola(lambda: (w**2).sum(), [w], [torch.tensor([2.0, 4.0])], step=0.5)
    >>> round(parabola.slope, 4), round(parabola.curvature, 4)
    (20.0, 40.0)
    """
    whole, direction = as_loss(loss, parameters), list(direction)
    length = math.hypot(*(vector_length(part) for part in direction if part is not None))
    roughest = whole.space.coarsest_dtype
    # its square is zero or has lost digits, and a step of the length of the weights overflows
    if length < torch.finfo(torch.promote_types(roughest, torch.float32)).tiny ** 0.5:
        return Parabola(0.0, 0.0, 0.0)
    if not math.isfinite(length):
        return Parabola(length, length, length)
    shortest = relative_step(roughest, second=True) * step_along(direction, whole.parameters)
    with whole.along(direction) as at:

        @cache
        def loss_at(alpha: float) -> float:
            return whole.combine(at(-alpha)).item()

        @cache
        def parabola_at(alpha: float) -> Parabola:
            fitted = fitted_parabola(loss_at, [-alpha, 0.0, alpha], squared_length=length**2, dtype=roughest)
            return replace(fitted, loss=loss_at(0.0))

        def drowns(parabola: Parabola) -> bool:
            return _digits(parabola, step, loss_at(0.0)) <= _RESOLVED * torch.finfo(roughest).eps

        if not step:
            return _searched(parabola_at, shortest, loss_at, roughest)
        expected = last.along(length) if last and last.squared_length > 0.0 else None
        if step < shortest and ((expected and drowns(expected)) or drowns(parabola_at(step))):
            return parabola_at(shortest)
        return parabola_at(step)


def _searched(
    parabola_at: Callable[[float], Parabola], alpha: float, loss_at: Callable[[float], float], dtype: torch.dtype
) -> Parabola:
    """Returns the first parabola whose second difference is resolved, and small beside the loss; at most six tries."""
    eps = torch.finfo(dtype).eps
    for _ in range(6):
        parabola = parabola_at(alpha)
        digits = _digits(parabola, alpha, loss_at(0.0))
        if digits <= _RESOLVED * eps:
            alpha *= 10.0
        elif digits > 10.0 * eps**0.5:  # three times as long as the step at which rounding and truncation are equal
            alpha *= math.sqrt(eps**0.5 / digits) if math.isfinite(digits) else 1e-3
        else:
            break
    return parabola


# Least second difference that is used, in units of the rounding error of the loss: the curvature is 2 % off there.
_RESOLVED = 100.0


def _digits(parabola: Parabola, alpha: float, loss: float) -> float:
    """Returns the second difference of the losses at −α, 0 and α over the loss; infinite unless all are finite."""
    if not parabola.is_finite:
        return math.inf
    return abs(parabola.curvature) * alpha**2 / max(abs(loss), abs(parabola.slope) * alpha, 1e-300)


def fitted_parabola(
    loss_at: Callable[[float], float],
    steps: Sequence[float],
    *,
    squared_length: float = math.nan,
    dtype: torch.dtype = torch.float32,
) -> Parabola:
    """Returns the least-squares parabola through losses at several steps.

    The steps −a, 0, a give the differences of the published approximate method. A curvature that is not larger than
    rounding, as for short steps, is returned as zero, and the parabola then has no optimal step.

    Args:
        loss_at: Returns L(w − αω) for a step α; called once for each step.
        steps: At least three different steps.
        squared_length: ‖ω‖², where it is known.
        dtype: The dtype in which the losses were computed.

    Raises:
        ValueError: If there are fewer than three different steps.

    >>> parabola = fitted_parabola(lambda step: (1 - step) ** 2, [-0.1, 0.0, 0.1])
    >>> round(parabola.slope, 6), round(parabola.curvature, 6)
    (2.0, 2.0)
    """
    if len(set(steps)) < 3:
        raise ValueError(f"expected at least three different steps to fit a parabola, got {list(steps)}")
    scale = max(map(abs, steps))
    losses = [loss_at(step) for step in steps]
    if not all(map(math.isfinite, losses)):
        return Parabola(math.nan, math.nan, squared_length)
    # exact arithmetic: the rounding of LAPACK depends on memory alignment, and runs would not repeat bit for bit
    x, y = [Fraction(step / scale) for step in steps], list(map(Fraction, losses))
    center = sum(x, Fraction()) / len(x)
    linear = [value - center for value in x]
    variance = _dot(linear, linear) / len(x)
    skew = _dot(linear, [value * value for value in linear]) / (len(x) * variance)
    quadratic = [value * value - skew * value - variance for value in linear]  # orthogonal to 1 and to `linear`
    second = _dot(quadratic, y) / _dot(quadratic, quadratic)
    first = float(_dot(linear, y) / _dot(linear, linear) - second * (2 * center + skew))
    # rounding is half a unit in the last place of a loss, and about twice that in the last coefficient of the fit
    noise = 2 * torch.finfo(dtype).eps * max(map(abs, losses))
    curvature = 2 * float(second) / scale**2 if abs(float(second)) > noise else 0.0
    return Parabola(-first / scale, curvature, squared_length)


def _dot(left: Sequence[Fraction], right: Sequence[Fraction]) -> Fraction:
    return sum((a * b for a, b in zip(left, right, strict=True)), Fraction())


def _slope_and_curvature(loss: Loss, omega: Tensor, curvature: LossCurvature, step: float) -> tuple[Tensor, Tensor]:
    """Returns ∇L·ω and ωᵀAω of this process's loss."""
    if curvature == "gauss_newton":
        with suppress(RuntimeError):  # if an operation has no derivative in forward mode
            slope, curved = forward_slope_and_curvature(loss, omega)
            return loss.combine(slope), loss.combine(curved)
    operator = curvature_operator(curvature, loss, loss.parameters)
    if isinstance(operator, FiniteDifferenceOperator):
        return operator.slope_and_curvature(omega, step=step)
    curved = operator.quadratic(omega)  # first, because the operator keeps its gradient
    return operator.gradient @ omega, curved
