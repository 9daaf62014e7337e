"""Curvature of a loss as symmetric operators, known by their products."""

from lightning_ifthpo.curvature.finite_difference import FiniteDifferenceOperator
from lightning_ifthpo.curvature.gauss_newton import GaussNewtonOperator
from lightning_ifthpo.curvature.hessian import HessianOperator
from lightning_ifthpo.curvature.marking import mark_outputs
from lightning_ifthpo.curvature.operator import CurvatureOperator, DampedOperator, LossOperator, MatrixOperator

__all__ = [
    "CurvatureOperator",
    "DampedOperator",
    "FiniteDifferenceOperator",
    "GaussNewtonOperator",
    "HessianOperator",
    "LossOperator",
    "MatrixOperator",
    "mark_outputs",
]
