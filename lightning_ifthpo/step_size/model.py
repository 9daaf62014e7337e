"""A loss along a direction, to second order: L(w − αω) ≈ L(w) − α slope + α²/2 curvature."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_ifthpo.curvature import Curvature, FiniteDifferenceOperator, curvature_operator
from lightning_ifthpo.loss_graph import LossValue
from lightning_ifthpo.space import ParameterSpace


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
        are all dead (Bu and Xu 2024, eq. 3.1).
        """
        return self.slope / self.curvature if self.curvature > 0.0 and math.isfinite(self.slope) else None

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
    curvature: Curvature = "hessian",
) -> DirectionalModel:
    """Returns the exact slope, and the curvature by one product.

    Args:
        loss: Callable without arguments that returns the scalar loss, or (loss, outputs).
        parameters: The tensors w.
        direction: ω, shaped like the parameters; None for zeros.
        curvature: "hessian", exact; "gauss_newton", never negative for a convex loss of the outputs;
            "finite_difference", from two gradients beside w.

    Cost: one forward pass, one differentiable gradient and one curvature product; by finite differences two gradients.

    >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> directional_model(lambda: (w**2).sum(), [w], [2 * w]).optimal_step  # gradient descent on ‖w‖²
    0.5
    """
    operator = curvature_operator(curvature, loss, parameters)
    omega = ParameterSpace(parameters).flatten(direction)
    if isinstance(operator, FiniteDifferenceOperator):
        slope, curved = operator.slope_and_curvature(omega)
    else:
        slope, curved = operator.gradient @ omega, operator.quadratic(omega)
    return DirectionalModel(*torch.stack([slope, curved, omega @ omega]).tolist())


def fitted_model(
    loss_at: Callable[[float], float], steps: Sequence[float], *, squared_length: float = math.nan
) -> DirectionalModel:
    """Returns the parabola that fits losses at several steps best, by least squares: no backward pass at all.

    Three steps −a, 0, a are the differences of the published approximate method. The curvature lives in the second
    difference of the losses, which rounding of the losses drowns when steps are short.

    Args:
        loss_at: Returns L(w − αω) for a step α.
        steps: At least three different steps.
        squared_length: ‖ω‖², where it is known.

    Raises:
        ValueError: If there are fewer than three different steps.
        FloatingPointError: If the curvature cannot be told from float32 rounding of the losses.

    Cost: one forward pass for each step.

    >>> model = fitted_model(lambda step: (1 - step) ** 2, [-0.1, 0.0, 0.1])
    >>> round(model.slope, 6), round(model.curvature, 6)
    (2.0, 2.0)
    """
    if len(set(steps)) < 3:
        raise ValueError(f"expected at least three different steps to fit a parabola, got {list(steps)}")
    alphas = torch.tensor(steps, dtype=torch.float64)
    scale = float(alphas.abs().amax())
    losses = torch.tensor([loss_at(step) for step in steps], dtype=torch.float64)
    powers = torch.stack([torch.ones_like(alphas), alphas / scale, (alphas / scale).square()], dim=1)
    _, first, second = torch.linalg.lstsq(powers, losses[:, None]).solution[:, 0].tolist()
    # a loss of float32 is known to half a unit in the last place; a fit sees about twice that in its last coefficient
    noise = torch.finfo(torch.float32).eps * float(losses.abs().amax())
    if not abs(second) > 2 * noise:
        raise FloatingPointError(
            f"a curvature of {2 * second / scale**2:.3g} cannot be told from rounding with steps of {scale:.3g}; use "
            "longer steps, or the exact curvature"
        )
    return DirectionalModel(-first / scale, 2 * second / scale**2, squared_length)


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
