"""The linear system that solvers see: a curvature and its damping."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_ifthpo.curvature.base import CurvatureOperator, DampedOperator


class LinearSystem:
    """The matrix A + δI, or A + diag(δ), of a linear system.

    Args:
        operator: A, symmetric, on vectors [n]. If it is damped already, its damping is added to δ.
        damping: δ >= 0, a number or [n], in loss / parameter²; as an attribute, on the device and in the dtype of A.

    Attributes:
        matrix: A + δI as one operator, for solvers that only need its products.

    Raises:
        ValueError: If δ is a vector that does not have shape [n].
    """

    def __init__(self, operator: CurvatureOperator, damping: float | Tensor = 0.0) -> None:
        if isinstance(operator, DampedOperator):
            damping = operator.delta + damping
            operator = operator.operator
        self.operator = self.matrix = operator
        self.damping = damping
        if isinstance(damping, Tensor) or damping != 0.0:
            self.matrix = damped = DampedOperator(operator, damping)
            self.damping = damped.delta

    def matvec(self, v: Tensor) -> Tensor:
        """Returns (A + δI) v for v: [n], by one product."""
        return self.matrix.matvec(v)

    def residual(self, x: Tensor, b: Tensor) -> Tensor:
        """Returns b − (A + δI) x, [n], by one product with a vector of length one: in float16 a long one overflows."""
        _, exponent = math.frexp(float(torch.linalg.vector_norm(x)))
        if abs(exponent) > 1000:  # zero, infinite or NaN, or beyond the powers of two
            return b - self.matvec(x)
        scale = 2.0**exponent  # exact
        return b - scale * self.matvec(x / scale)

    def relative_residual(self, x: Tensor, b: Tensor) -> float:
        """Returns ‖(A + δI) x − b‖ / ‖b‖, by one product."""
        return float(torch.linalg.vector_norm(self.residual(x, b)) / torch.linalg.vector_norm(b))
