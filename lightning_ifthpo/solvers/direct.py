"""The exact solution, the reference for the other solvers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_ifthpo.curvature.base import InvertibleOperator
from lightning_ifthpo.solvers.base import Solver, SolveResult, Status, at_least, status_without_tolerance
from lightning_ifthpo.solvers.system import LinearSystem


@dataclass(frozen=True)
class Direct(Solver):
    """A⁻¹b, exactly; the shortest least-squares solution where A is singular. A may be indefinite.

    Cost: n products, n² memory and n³ operations for the dense matrix; for curvatures with a closed-form inverse
    ("gradient_outer_product", "kfac") only that, and one extra product for the residual.

    Attributes:
        max_size: Largest n that is accepted for a dense matrix.

    >>> from lightning_ifthpo.curvature import MatrixOperator
    >>> Direct().solve(MatrixOperator(torch.diag(torch.tensor([2.0, 0.0]))), torch.tensor([1.0, 0.0])).x
    tensor([0.5000, 0.0000])
    """

    max_size: int = at_least(1, default=10_000)

    def _solve(self, system: LinearSystem, b: Tensor, x0: Tensor | None) -> SolveResult:
        if isinstance(system.operator, InvertibleOperator):
            x = system.operator.solve(b, system.damping)
            residual = system.relative_residual(x, b)
            return SolveResult(x, residual, 0, status_without_tolerance(residual, b.dtype), extra_products=1)
        size = len(b)
        if size > self.max_size:
            raise ValueError(
                f"Direct would need a dense {size} × {size} matrix, and max_size is {self.max_size}; use "
                "ConjugateGradient or MinimumResidual"
            )
        matrix = system.matrix.to_dense()
        if not bool(torch.isfinite(matrix).all()):
            return SolveResult(torch.zeros_like(b), torch.nan, size, Status.NONFINITE)
        values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
        floor = size * torch.finfo(b.dtype).eps * values.abs().amax()  # numerical rank, as in numpy.linalg.matrix_rank
        inverse = torch.where(values.abs() > floor, 1.0 / values, 0.0)
        x = vectors @ (inverse * (vectors.T @ b))
        residual = float(torch.linalg.vector_norm(matrix @ x - b))
        return SolveResult(x, residual, size, status_without_tolerance(residual, b.dtype))
