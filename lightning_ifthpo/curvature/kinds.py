"""Curvatures by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias, get_args

from torch import Tensor

from lightning_ifthpo.core.loss import LossValue
from lightning_ifthpo.curvature.base import LossOperator
from lightning_ifthpo.curvature.distributed import AllReduce, SummedOperator
from lightning_ifthpo.curvature.finite_difference import FiniteDifferenceOperator
from lightning_ifthpo.curvature.gauss_newton import GaussNewtonOperator
from lightning_ifthpo.curvature.hessian import HessianOperator
from lightning_ifthpo.curvature.kfac import KFACOperator
from lightning_ifthpo.curvature.outer_product import GradientOuterProductOperator

LossCurvature: TypeAlias = Literal["hessian", "gauss_newton", "finite_difference"]
"""That of the loss itself, worth measuring; the others only stand for it where it is to be inverted."""

Curvature: TypeAlias = LossCurvature | Literal["gradient_outer_product", "kfac"]

OPERATORS: dict[str, Callable[[Callable[[], LossValue], Sequence[Tensor]], LossOperator]] = {
    "hessian": HessianOperator,
    "gauss_newton": GaussNewtonOperator,
    "gradient_outer_product": GradientOuterProductOperator,
    "kfac": KFACOperator,
    "finite_difference": FiniteDifferenceOperator,
}


def curvature_operator(
    curvature: Curvature,
    loss: Callable[[], LossValue],
    parameters: Sequence[Tensor],
    all_reduce: AllReduce | None = None,
) -> LossOperator:
    """Returns the curvature of a loss under its name.

    Args:
        curvature: "hessian", "gauss_newton", "gradient_outer_product", "kfac" or "finite_difference".
        loss: Callable without arguments that returns the scalar loss, or (loss, outputs).
        parameters: The tensors w, together [n].
        all_reduce: Sums over the processes that have a share of the loss each; None where there is one process.

    Raises:
        ValueError: If the name is unknown, or the curvature of a sum is not the sum of curvatures.
    """
    if curvature not in OPERATORS:
        raise ValueError(f"expected curvature to be one of {sorted(OPERATORS)}, got {curvature!r}")
    if all_reduce is None:
        return OPERATORS[curvature](loss, parameters)
    if curvature not in get_args(LossCurvature):
        raise ValueError(
            f"curvature={curvature!r} needs all examples in one process; with several devices use 'gauss_newton'"
        )
    return SummedOperator(OPERATORS[curvature](loss, parameters), all_reduce)
