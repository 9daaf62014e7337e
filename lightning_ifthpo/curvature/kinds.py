"""Curvatures by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

from torch import Tensor

from lightning_ifthpo.core.loss import Loss, LossFunction
from lightning_ifthpo.curvature.base import LossOperator
from lightning_ifthpo.curvature.finite_difference import FiniteDifferenceOperator
from lightning_ifthpo.curvature.gauss_newton import GaussNewtonOperator
from lightning_ifthpo.curvature.hessian import HessianOperator
from lightning_ifthpo.curvature.kfac import KFACOperator
from lightning_ifthpo.curvature.outer_product import GradientOuterProductOperator

LossCurvature: TypeAlias = Literal["hessian", "gauss_newton", "finite_difference"]
"""Curvatures of the loss itself. The others are approximations, meant only for linear solves."""

Curvature: TypeAlias = LossCurvature | Literal["gradient_outer_product", "kfac"]

OPERATORS: dict[str, Callable[[LossFunction | Loss, Sequence[Tensor]], LossOperator]] = {
    "hessian": HessianOperator,
    "gauss_newton": GaussNewtonOperator,
    "gradient_outer_product": GradientOuterProductOperator,
    "kfac": KFACOperator,
    "finite_difference": FiniteDifferenceOperator,
}


def curvature_operator(curvature: Curvature, loss: LossFunction | Loss, parameters: Sequence[Tensor]) -> LossOperator:
    """Returns the curvature operator with this name.

    Args:
        curvature: "hessian", "gauss_newton", "gradient_outer_product", "kfac" or "finite_difference".
        loss: Callable without arguments that returns the scalar loss, or (loss, outputs); or a `Loss`.
        parameters: The tensors w, together [n].

    Raises:
        ValueError: If the name is unknown. See also the operators.

    >>> import torch
    >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> curvature_operator("hessian", lambda: (w**3).sum(), [w]).to_dense()
    tensor([[ 6.,  0.],
            [ 0., 12.]])
    """
    if curvature not in OPERATORS:
        raise ValueError(f"expected curvature to be one of {sorted(OPERATORS)}, got {curvature!r}")
    return OPERATORS[curvature](loss, parameters)
