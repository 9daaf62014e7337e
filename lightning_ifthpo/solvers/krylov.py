"""Krylov methods: conjugate gradients for positive definite systems, minimum residual for indefinite ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_ifthpo.core.validation import require_fraction
from lightning_ifthpo.solvers.base import Solver, SolveResult, Status, at_least
from lightning_ifthpo.solvers.nystrom import Nystrom
from lightning_ifthpo.solvers.system import LinearSystem


@dataclass(frozen=True)
class _Krylov(Solver):
    max_iterations: int = at_least(1, default=20)
    rtol: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require_fraction("rtol", self.rtol)

    def _tolerance(self, dtype: torch.dtype) -> float:
        # b has length one, so that a residual below 10 eps is rounding, and a step along it would be noise
        return max(self.rtol or 0.0, 10.0 * torch.finfo(dtype).eps)

    def _finished(self, system: LinearSystem, b: Tensor, result: SolveResult) -> SolveResult:
        """Returns a result with its final status; COMPLETE stands for an iteration that did not break down."""
        tolerance, residual, status = self._tolerance(b.dtype), result.relative_residual, result.status
        if residual <= tolerance:
            status = Status.CONVERGED
        elif status is Status.COMPLETE and self.rtol is not None:
            status = Status.MAX_ITERATIONS
        if result.products <= 20 or status is Status.NONFINITE:
            return replace(result, status=status)
        residual = system.relative_residual(result.x, b)  # the recursion drifts from it after about 20 products
        if status is Status.CONVERGED and self.rtol is not None and residual > 2.0 * tolerance:
            status = Status.MAX_ITERATIONS
        if status.succeeded and residual > 1.0:
            status = Status.DIVERGED  # worse than zero
        return replace(result, relative_residual=residual, status=status, extra_products=1)


@dataclass(frozen=True)
class ConjugateGradient(_Krylov):
    """Conjugate gradients (Hestenes and Stiefel 1952), for positive definite operators.

    If the curvature along a search direction is not positive, the solve returns the last iterate, with the status
    NEGATIVE_CURVATURE: at an indefinite Hessian a solution is meaningless, at a singular one it need not exist.

    Cost: one product per iteration and for x0, `rank` for a preconditioner, and one for the residual after 20 products.

    Attributes:
        max_iterations: Iterations at most.
        rtol: Stop when ‖Ax − b‖ <= rtol ‖b‖. If None, all iterations are done, and the status is COMPLETE.
        preconditioner: A low-rank approximation of A, computed for each solve: worth its products where a few
            eigenvalues are far larger than the rest.

    >>> from lightning_ifthpo.curvature import MatrixOperator
    >>> matrix = torch.diag(torch.tensor([1.0, 2.0]))
    >>> ConjugateGradient(max_iterations=2).solve(MatrixOperator(matrix), torch.tensor([1.0, 1.0])).x
    tensor([1.0000, 0.5000])
    """

    preconditioner: Nystrom | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.preconditioner, Nystrom | None):
            raise TypeError(f"expected preconditioner to be a Nystrom(rank=...) or None, got {self.preconditioner!r}")
        if self.preconditioner is not None and self.preconditioner.damping != 0.0:
            raise ValueError("a preconditioner takes the damping of the solver; leave its own at zero")

    def _solve(self, system: LinearSystem, b: Tensor, x0: Tensor | None) -> SolveResult:
        x, residual, products = _start(system, b, x0)
        precondition: Callable[[Tensor], Tensor] = lambda v: v  # noqa: E731
        if self.preconditioner is not None:
            approximation = self.preconditioner.approximation(system)
            precondition, products = approximation.precondition, products + approximation.products
        direction = precondition(residual)
        squared, slope = torch.stack([residual @ residual, residual @ direction]).tolist()
        tolerance, stiffest, status = self._tolerance(b.dtype), 0.0, Status.COMPLETE
        for _ in range(self.max_iterations):
            if not math.sqrt(squared) > tolerance:
                break
            image = system.matvec(direction)
            products += 1
            along = direction @ image
            step = slope / along
            new_residual = residual - step * image
            conditioned = precondition(new_residual)
            curvature, length, new_squared, new_slope = torch.stack(
                [along, direction @ direction, new_residual @ new_residual, new_residual @ conditioned]
            ).tolist()
            stiffest = max(stiffest, curvature / length)
            # below eps · largest Rayleigh quotient a curvature is rounding, and counts as zero
            if not curvature > torch.finfo(b.dtype).eps * stiffest * length:
                status = Status.NONFINITE if math.isnan(curvature) else Status.NEGATIVE_CURVATURE
                break
            x = x + step * direction
            residual = new_residual
            direction = conditioned + (new_slope / slope) * direction
            squared, slope = new_squared, new_slope
        return self._finished(system, b, SolveResult(x, math.sqrt(squared), products, status))


@dataclass(frozen=True)
class MinimumResidual(_Krylov):
    """MINRES (Paige and Saunders 1975), for symmetric operators of any sign.

    Minimizes ‖Ax − b‖ over the Krylov space, so that the residual never grows. On a singular system it ends at a
    least-squares solution, with the residual that remains. Cost and options: as `ConjugateGradient`, without a
    preconditioner.

    >>> from lightning_ifthpo.curvature import MatrixOperator
    >>> matrix = torch.diag(torch.tensor([1.0, -2.0]))
    >>> MinimumResidual(max_iterations=2).solve(MatrixOperator(matrix), torch.tensor([1.0, 1.0])).x
    tensor([ 1.0000, -0.5000])
    """

    def _solve(self, system: LinearSystem, b: Tensor, x0: Tensor | None) -> SolveResult:
        x, residual, products = _start(system, b, x0)
        error = float(torch.linalg.vector_norm(residual))
        tolerance, eps, status = self._tolerance(b.dtype), torch.finfo(b.dtype).eps, Status.COMPLETE
        # Lanczos vectors v, directions d (the columns of V R⁻¹), and the last two of the rotations that make R
        v_old, v = torch.zeros_like(b), residual / error
        d_old, d = torch.zeros_like(b), torch.zeros_like(b)
        (cos_old, sin_old), (cos, sin) = (1.0, 0.0), (1.0, 0.0)
        signed_error, beta, scale = error, 0.0, 0.0
        for _ in range(self.max_iterations):
            if not abs(signed_error) > tolerance:
                break
            image = system.matvec(v) - beta * v_old
            products += 1
            projection = v @ image
            image = image - projection * v
            alpha, beta_new = torch.stack([projection, torch.linalg.vector_norm(image)]).tolist()
            scale = max(scale, abs(alpha), beta_new)
            second, first = sin_old * beta, cos * cos_old * beta + sin * alpha
            corner = cos * alpha - sin * cos_old * beta
            diagonal = math.hypot(corner, beta_new)
            if not diagonal > 10.0 * eps * scale:  # A is singular on the Krylov space, up to rounding; or NaN
                status = Status.NONFINITE if math.isnan(diagonal) else status
                break
            (cos_old, sin_old), (cos, sin) = (cos, sin), (corner / diagonal, beta_new / diagonal)
            d_old, d = d, (v - first * d - second * d_old) / diagonal
            x = x + (cos * signed_error) * d
            signed_error *= -sin
            v_old, v, beta = v, image / max(beta_new, torch.finfo(b.dtype).tiny), beta_new
        return self._finished(system, b, SolveResult(x, abs(signed_error), products, status))


def _start(system: LinearSystem, b: Tensor, x0: Tensor | None) -> tuple[Tensor, Tensor, int]:
    """Returns the first iterate, its residual, and the number of products used."""
    if x0 is None or not bool(x0.any()):
        return torch.zeros_like(b), b, 0
    return x0, b - system.matvec(x0), 1
