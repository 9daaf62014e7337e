"""A loss along a direction, to second order: L(w − αω) ≈ L(w) − α slope + α²/2 curvature."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from lightning_ifthpo.core.loss import LossValue, check_loss, loss_and_outputs
from lightning_ifthpo.core.random_state import RandomState
from lightning_ifthpo.core.space import ParameterSpace
from lightning_ifthpo.curvature import AllReduce, FiniteDifferenceOperator, LossCurvature, curvature_operator
from lightning_ifthpo.curvature.gauss_newton import forward_slope_and_curvature


@dataclass(frozen=True)
class DirectionalModel:
    """A parabola through a loss.

    Attributes:
        slope: ∇L·ω; positive where a step along −ω begins to lower the loss.
        curvature: ωᵀHω.
        squared_length: ‖ω‖².

    >>> DirectionalModel(slope=2.0, curvature=4.0, squared_length=1.0).optimal_step
    0.5
    """

    slope: float
    curvature: float
    squared_length: float

    @property
    def optimal_step(self) -> float | None:
        """α* = slope / curvature, where the parabola is lowest; None where it has no lowest point.

        That is where the curvature is not positive: a linear or concave stretch, or 0/0, as in a network whose units
        are all dead or exactly at their kink (Bu and Xu 2024, eq. 3.1).
        """
        return self.slope / self.curvature if self.curvature > 0.0 and math.isfinite(self.slope) else None

    def at(self, step: float) -> DirectionalModel:
        """Returns the same parabola as seen from w − step · ω."""
        return DirectionalModel(self.slope - step * self.curvature, self.curvature, self.squared_length)

    @property
    def sharpness(self) -> float:
        """Directional sharpness ωᵀHω / ‖ω‖², in loss / parameter²; zero for a zero direction."""
        return self.curvature / self.squared_length if self.squared_length else 0.0

    @property
    def is_finite(self) -> bool:
        """Whether all three numbers are."""
        return all(map(math.isfinite, (self.slope, self.curvature, self.squared_length)))


def directional_model(
    loss: Callable[[], LossValue],
    parameters: Sequence[Tensor],
    direction: Sequence[Tensor | None],
    *,
    curvature: LossCurvature = "hessian",
    all_reduce: AllReduce | None = None,
) -> DirectionalModel:
    """Returns the exact slope, and the curvature by one product.

    Args:
        loss: Callable without arguments that returns the scalar loss, or (loss, outputs).
        parameters: The tensors w.
        direction: ω, shaped like the parameters; None for zeros.
        curvature: "hessian", exact; "gauss_newton", never negative for a convex loss of the outputs;
            "finite_difference", from two gradients beside w.
        all_reduce: Sums over processes that have a share of the loss each; None where there is one process.

    Cost: for the Hessian one forward pass, one differentiable gradient and one product; for Gauss–Newton a forward pass
    that carries derivatives along, or, where an operation has none in forward mode, as for the Hessian; by finite
    differences two gradients.

    >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> directional_model(lambda: (w**2).sum(), [w], [2 * w]).optimal_step  # gradient descent on ‖w‖²
    0.5
    """
    omega = ParameterSpace(parameters).flatten(direction)
    pair = torch.stack(_slope_and_curvature(loss, parameters, omega, curvature))
    slope, curved = (pair if all_reduce is None else all_reduce(pair)).tolist()
    return DirectionalModel(slope, curved, float(omega @ omega))


def three_point_model(
    loss: Callable[[], LossValue],
    parameters: Sequence[Tensor],
    direction: Sequence[Tensor | None],
    *,
    step: float = 0.0,
    all_reduce: AllReduce | None = None,
) -> DirectionalModel:
    """Returns slope and curvature as differences of three losses, L(w + αω), L(w) and L(w − αω).

    Needs no derivative at all, and shows the loss at the scale of a step, kinks included. All three draw the same
    random numbers. The curvature is zero where it cannot be told from rounding.

    Args:
        loss: Callable without arguments that returns the scalar loss, or (loss, outputs).
        parameters: The tensors w.
        direction: ω, shaped like the parameters; None for zeros.
        step: α; made longer where rounding of the losses would drown their second difference, so that α‖ω‖ is at least
            cbrt(machine epsilon) · max(1, ‖w‖). Where none is given, up to a hundred times as long, until the second
            difference shows.
        all_reduce: Sums over processes that have a share of the loss each; None where there is one process.

    Cost: three forward passes, where no step is given up to nine, and one extra copy of the parameters.

    >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> model = three_point_model(lambda: (w**2).sum(), [w], [torch.tensor([2.0, 4.0])], step=0.5)
    >>> round(model.slope, 4), round(model.curvature, 4)
    (20.0, 40.0)
    """
    tensors = ParameterSpace(parameters).tensors
    length = math.sqrt(sum(float(along.square().sum()) for along in direction if along is not None))
    if length == 0.0 or not math.isfinite(length):
        return DirectionalModel(length, length, length)
    reach = max(1.0, math.sqrt(sum(float(tensor.detach().square().sum()) for tensor in tensors)))
    roughest = max((tensor.dtype for tensor in tensors), key=lambda dtype: torch.finfo(dtype).eps)
    shortest = torch.finfo(roughest).eps ** (1 / 3) * reach / length
    state = RandomState(tensors[0].device)
    originals = [tensor.detach().clone() for tensor in tensors]

    def loss_at(alpha: float) -> float:
        _place(tensors, originals, direction, alpha)
        with state.replayed():
            value, _ = loss_and_outputs(loss())
        check_loss(value, "the loss")
        return (value if all_reduce is None else all_reduce(value)).item()

    try:
        for alpha in [max(step, shortest)] if step else [shortest, 10.0 * shortest, 100.0 * shortest]:
            model = fitted_model(loss_at, [-alpha, 0.0, alpha], squared_length=length**2, dtype=roughest)
            if model.curvature != 0.0:
                break
        return model
    finally:
        _place(tensors, originals, direction, 0.0)


def fitted_model(
    loss_at: Callable[[float], float],
    steps: Sequence[float],
    *,
    squared_length: float = math.nan,
    dtype: torch.dtype = torch.float32,
) -> DirectionalModel:
    """Returns the parabola that fits losses at several steps best, by least squares.

    Three steps −a, 0, a are the differences of the published approximate method. The curvature lives in the second
    difference of the losses, which rounding of the losses drowns when steps are short; then it is returned as zero, and
    the parabola has no optimal step.

    Args:
        loss_at: Returns L(w − αω) for a step α.
        steps: At least three different steps.
        squared_length: ‖ω‖², where it is known.
        dtype: In which losses were computed.

    Raises:
        ValueError: If there are fewer than three different steps.

    Cost: one forward pass for each step.

    >>> model = fitted_model(lambda step: (1 - step) ** 2, [-0.1, 0.0, 0.1])
    >>> round(model.slope, 6), round(model.curvature, 6)
    (2.0, 2.0)
    """
    if len(set(steps)) < 3:
        raise ValueError(f"expected at least three different steps to fit a parabola, got {list(steps)}")
    scale = max(map(abs, steps))
    losses = [loss_at(step) for step in steps]
    if not all(map(math.isfinite, losses)):
        return DirectionalModel(math.nan, math.nan, squared_length)
    first, second = _parabola([step / scale for step in steps], losses)
    # a loss is known to half a unit in the last place; a fit sees about twice that in its last coefficient
    noise = 2 * torch.finfo(dtype).eps * max(map(abs, losses))
    curvature = 2 * second / scale**2 if abs(second) > noise else 0.0
    return DirectionalModel(-first / scale, curvature, squared_length)


def _parabola(steps: Sequence[float], losses: Sequence[float]) -> tuple[float, float]:
    """Returns b and c of the parabola a + bx + cx² nearest to points, without rounding.

    LAPACK would round, and how depends on where its arguments lie in memory, so that no run could be repeated to the
    last bit.
    """
    x, y = list(map(Fraction, steps)), list(map(Fraction, losses))
    center = sum(x, Fraction()) / len(x)
    linear = [value - center for value in x]
    variance = _dot(linear, linear) / len(x)
    skew = _dot(linear, [value * value for value in linear]) / (len(x) * variance)
    quadratic = [value * value - skew * value - variance for value in linear]  # orthogonal to 1 and to the linear one
    first = _dot(linear, y) / _dot(linear, linear)
    second = _dot(quadratic, y) / _dot(quadratic, quadratic)
    return float(first - second * (2 * center + skew)), float(second)


def _dot(left: Sequence[Fraction], right: Sequence[Fraction]) -> Fraction:
    return sum((a * b for a, b in zip(left, right, strict=True)), Fraction())


def group_model(
    loss: Callable[[], LossValue], groups: Sequence[Sequence[Tensor]], directions: Sequence[Sequence[Tensor]]
) -> tuple[Tensor, Tensor]:
    """Returns slopes [K] and curvatures [K, K] of a loss along one direction for each of K parameter groups.

    L(w − Σ αₖωₖ) ≈ L(w) − slopes·α + αᵀ curvatures α / 2, with ωₖ zero outside of its group.

    Args:
        loss: Callable without arguments that returns the scalar loss, or (loss, outputs).
        groups: The tensors of each group.
        directions: ωₖ, shaped like them.

    Cost: one forward pass, one differentiable gradient and K products.
    """
    parameters = [tensor for group in groups for tensor in group]
    space = ParameterSpace(parameters)
    operator = curvature_operator("hessian", loss, parameters)
    rows = []
    for index, direction in enumerate(directions):
        blocks = [direction if other == index else [None] * len(group) for other, group in enumerate(groups)]
        rows.append(space.flatten([tensor for block in blocks for tensor in block]))
    omegas = torch.stack(rows)
    products = torch.stack([operator.matvec(omega) for omega in omegas])
    return omegas @ operator.gradient, omegas @ products.T


def optimal_group_steps(slopes: Tensor, curvatures: Tensor, *, diagonal: bool = False) -> Tensor:
    """Returns the step of each group, [K], that minimizes the quadratic model.

    Directions of the K-dimensional space in which the model does not curve upwards get no step.

    Args:
        slopes: [K].
        curvatures: [K, K], symmetric.
        diagonal: Ignore how groups act on each other.

    >>> optimal_group_steps(torch.tensor([1.0, 1.0]), torch.tensor([[2.0, 0.0], [0.0, 4.0]]))
    tensor([0.5000, 0.2500])
    """
    matrix = torch.diag(curvatures.diagonal()) if diagonal else (curvatures + curvatures.T) / 2
    values, vectors = torch.linalg.eigh(matrix)
    # eps · K: what rounding may make of a zero eigenvalue
    upwards = values > torch.finfo(values.dtype).eps * len(values) * values.abs().amax()
    inverse = torch.where(upwards, 1.0 / torch.where(upwards, values, 1.0), 0.0)
    steps: Tensor = vectors @ (inverse * (vectors.T @ slopes))
    return steps


def _slope_and_curvature(
    loss: Callable[[], LossValue], parameters: Sequence[Tensor], omega: Tensor, curvature: LossCurvature
) -> tuple[Tensor, Tensor]:
    if curvature == "gauss_newton":
        with suppress(RuntimeError):  # of an operation without a derivative in forward mode
            return forward_slope_and_curvature(loss, parameters, omega)
    operator = curvature_operator(curvature, loss, parameters)
    if isinstance(operator, FiniteDifferenceOperator):
        return operator.slope_and_curvature(omega)
    return operator.gradient @ omega, operator.quadratic(omega)


@torch.no_grad()
def _place(
    tensors: Sequence[Tensor], originals: Sequence[Tensor], direction: Sequence[Tensor | None], alpha: float
) -> None:
    """Sets tensors to w − αω."""
    for tensor, original, along in zip(tensors, originals, direction, strict=True):
        tensor.copy_(original)
        if alpha and along is not None:
            tensor.sub_(along, alpha=alpha)
