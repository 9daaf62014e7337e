"""Curvature of a loss as symmetric linear operators, used through their products with vectors."""

from lightning_ifthpo.core.marking import mark_outputs
from lightning_ifthpo.curvature.average import AverageOperator
from lightning_ifthpo.curvature.base import CurvatureOperator, LossOperator, MatrixOperator
from lightning_ifthpo.curvature.distributed import DistributedOperator
from lightning_ifthpo.curvature.finite_difference import FiniteDifferenceOperator
from lightning_ifthpo.curvature.gauss_newton import GaussNewtonOperator
from lightning_ifthpo.curvature.hessian import HessianOperator
from lightning_ifthpo.curvature.kfac import KFACOperator
from lightning_ifthpo.curvature.kinds import Curvature, curvature_operator
from lightning_ifthpo.curvature.outer_product import GradientOuterProductOperator

__all__ = [
    "AverageOperator",
    "Curvature",
    "CurvatureOperator",
    "DistributedOperator",
    "FiniteDifferenceOperator",
    "GaussNewtonOperator",
    "GradientOuterProductOperator",
    "HessianOperator",
    "KFACOperator",
    "LossOperator",
    "MatrixOperator",
    "curvature_operator",
    "mark_outputs",
]
