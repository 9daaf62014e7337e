"""Curvatures by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

from torch import Tensor

from lightning_ifthpo.curvature.finite_difference import FiniteDifferenceOperator
from lightning_ifthpo.curvature.gauss_newton import GaussNewtonOperator
from lightning_ifthpo.curvature.hessian import HessianOperator
from lightning_ifthpo.curvature.operator import LossOperator
from lightning_ifthpo.curvature.outer_product import GradientOuterProductOperator
from lightning_ifthpo.loss_graph import LossValue

Curvature: TypeAlias = Literal["hessian", "gauss_newton", "gradient_outer_product", "finite_difference"]

OperatorFactory: TypeAlias = Callable[[Callable[[], LossValue], Sequence[Tensor]], LossOperator]

OPERATORS: dict[str, OperatorFactory] = {
    "hessian": HessianOperator,
    "gauss_newton": GaussNewtonOperator,
    "gradient_outer_product": GradientOuterProductOperator,
    "finite_difference": FiniteDifferenceOperator,
}


def curvature_operator(
    curvature: Curvature | OperatorFactory, loss: Callable[[], LossValue], parameters: Sequence[Tensor]
) -> LossOperator:
    """Returns the curvature of a loss under its name.

    Args:
        curvature: "hessian", "gauss_newton", "gradient_outer_product" or "finite_difference"; or what makes an operator
            of a loss and its parameters.
        loss: Callable without arguments that returns the scalar loss, or (loss, outputs).
        parameters: The tensors w, together [n].

    Raises:
        ValueError: If the name is unknown.
    """
    if callable(curvature):
        return curvature(loss, parameters)
    if curvature not in OPERATORS:
        raise ValueError(f"expected curvature to be one of {sorted(OPERATORS)}, got {curvature!r}")
    return OPERATORS[curvature](loss, parameters)
