"""The exact solution by the dense matrix: the reference for all others."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_ifthpo.core.validation import require_at_least
from lightning_ifthpo.curvature.base import CurvatureOperator, InvertibleOperator, undamped
from lightning_ifthpo.solvers.base import Solver, SolveResult, Status, measured_residual, status_without_tolerance


@dataclass(frozen=True)
class Direct(Solver):
    """A⁻¹b, exactly; the shortest least-squares solution where A is singular.

    From the closed form of a curvature that has one ("gradient_outer_product"), at no cost but a check of the residual.
    Else from the eigendecomposition of the dense matrix: n products, n² memory and n³ operations. It does not ask for
    the sign of A.

    Attributes:
        max_size: Largest n that is accepted for a dense matrix.

    >>> from lightning_ifthpo.curvature import MatrixOperator
    >>> Direct().solve(MatrixOperator(torch.diag(torch.tensor([2.0, 0.0]))), torch.tensor([1.0, 0.0])).x
    tensor([0.5000, 0.0000])
    """

    max_size: int = 10_000

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least("max_size", self.max_size, 1)

    def _solve(self, operator: CurvatureOperator, b: Tensor, x0: Tensor | None) -> SolveResult:
        bare, delta = undamped(operator)
        if isinstance(bare, InvertibleOperator):
            x = bare.solve(b, delta)
            residual = measured_residual(operator, x, b)
            return SolveResult(x, residual, 0, status_without_tolerance(residual, b.dtype), checks=1)
        size = operator.size
        if size > self.max_size:
            raise ValueError(
                f"Direct would need a dense {size} × {size} matrix, and max_size is {self.max_size}; use "
                "ConjugateGradient or MinimumResidual"
            )
        matrix = operator.to_dense()
        if not bool(torch.isfinite(matrix).all()):
            return SolveResult(torch.zeros_like(b), torch.nan, size, Status.NONFINITE)
        values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
        floor = size * torch.finfo(b.dtype).eps * values.abs().amax()  # numerical rank, as in numpy.linalg.matrix_rank
        inverse = torch.where(values.abs() > floor, 1.0 / values, 0.0)
        x = vectors @ (inverse * (vectors.T @ b))
        residual = float(torch.linalg.vector_norm(matrix @ x - b))
        return SolveResult(x, residual, size, status_without_tolerance(residual, b.dtype))
