"""Curvature of a loss as symmetric operators, known by their products."""

from lightning_ifthpo.curvature.average import AverageOperator
from lightning_ifthpo.curvature.base import (
    CurvatureOperator,
    DampedOperator,
    InvertibleOperator,
    LossOperator,
    MatrixOperator,
    PreconditionedOperator,
)
from lightning_ifthpo.curvature.distributed import AllReduce, SummedOperator
from lightning_ifthpo.curvature.finite_difference import FiniteDifferenceOperator
from lightning_ifthpo.curvature.gauss_newton import GaussNewtonOperator
from lightning_ifthpo.curvature.hessian import HessianOperator
from lightning_ifthpo.curvature.kfac import KFACOperator
from lightning_ifthpo.curvature.kinds import Curvature, LossCurvature, curvature_operator
from lightning_ifthpo.curvature.outer_product import GradientOuterProductOperator
from lightning_ifthpo.curvature.outputs import mark_outputs

__all__ = [
    "AllReduce",
    "AverageOperator",
    "Curvature",
    "CurvatureOperator",
    "DampedOperator",
    "FiniteDifferenceOperator",
    "GaussNewtonOperator",
    "GradientOuterProductOperator",
    "HessianOperator",
    "InvertibleOperator",
    "KFACOperator",
    "LossCurvature",
    "LossOperator",
    "MatrixOperator",
    "PreconditionedOperator",
    "SummedOperator",
    "curvature_operator",
    "mark_outputs",
]
