"""Krylov methods: conjugate gradients for positive definite systems, minimum residual for indefinite ones."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_ifthpo.core.validation import require_fraction
from lightning_ifthpo.solvers.base import Solver, SolveResult, Status, at_least, is_negative, rounding_residual
from lightning_ifthpo.solvers.nystrom import LowRank, Nystrom
from lightning_ifthpo.solvers.system import LinearSystem


class _Run(NamedTuple):
    """One run of a recursion: its last iterate, and the residual that the recursion claims for it.

    The status is COMPLETE unless the recursion broke down. The largest Rayleigh quotient is `stiffest`.
    """

    x: Tensor
    claim: float
    products: int
    status: Status
    stiffest: float


@dataclass(frozen=True)
class _Krylov(Solver):
    max_iterations: int = at_least(1, default=20)
    rtol: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require_fraction("rtol", self.rtol)

    def _solve(self, system: LinearSystem, b: Tensor, x0: Tensor | None) -> SolveResult:
        """Runs the recursion, measures the true residual, and runs again from there where the recursion was wrong.

        In low precision, or where A is ill conditioned, the residual of a recursion falls while the true one stays.
        """
        x, residual, products = _start(system, b, x0)
        error, left, checks = _length(residual), self.max_iterations, 0
        # b has length one, so that a residual below some eps is rounding, and a step along it would be noise
        eps = torch.finfo(b.dtype).eps
        tolerance = 10.0 * eps if self.rtol is None else max(self.rtol, eps)
        low_rank = self._low_rank(system)
        products += low_rank.products if low_rank else 0
        # preconditioned directions may lie where the curvature is small, and rounding is relative to the largest
        run = _Run(x, 0.0, 0, Status.COMPLETE, low_rank.largest if low_rank else 0.0)
        while left and not error <= tolerance:
            run = self._run(system, run._replace(x=x), residual, (left, tolerance), low_rank)
            left -= run.products
            if run.x is x:  # it broke down at once
                break
            true = system.residual(run.x, b)
            checks, before, length = checks + 1, error, _length(true)
            if length > before and (checks > 1 or not self._may_grow):
                break
            x, residual, error = run.x, true, length
            # a run that does not halve the residual has reached rounding
            if run.claim > tolerance or not error < before / 2.0:
                break
        status = run.status
        if error <= (rounding_residual(b.dtype) if self.rtol is None else tolerance):
            status = Status.CONVERGED
        elif status is Status.COMPLETE and self.rtol is not None:
            status = Status.MAX_ITERATIONS
        return SolveResult(x, error, products + self.max_iterations - left, status, extra_products=checks)

    _may_grow = False
    """Whether the residual may grow while x improves."""

    def _low_rank(self, system: LinearSystem) -> LowRank | None:
        """Returns the preconditioner, if there is one."""
        return None

    @abstractmethod
    def _run(
        self, system: LinearSystem, start: _Run, residual: Tensor, limits: tuple[int, float], low_rank: LowRank | None
    ) -> _Run:
        """Iterates from start.x with its true residual, up to a number of products or a length of the residual."""


@dataclass(frozen=True)
class ConjugateGradient(_Krylov):
    """Conjugate gradients (Hestenes and Stiefel 1952), for positive definite operators.

    The error falls in the norm of A, while the residual may grow, even beyond that of x = 0. If the curvature along a
    search direction is negative, the solve returns the last iterate with the status NEGATIVE_CURVATURE, because at an
    indefinite Hessian a solution is meaningless. Where it is zero up to rounding, A is singular and b lies outside of
    its range; the status is then MAX_ITERATIONS. `MinimumResidual` solves such a system by least squares.

    Cost: one product per iteration and for x0, `rank` for a preconditioner, and one for the residual. Where that shows
    that the recursion was wrong, the solve goes on from there, with one more for each such restart.

    Attributes:
        max_iterations: Iterations at most.
        rtol: Stop when ‖Ax − b‖ <= rtol ‖b‖, with an rtol of at least the dtype's eps. If None, all iterations are
            done; the status is COMPLETE, or CONVERGED if the residual is below √eps.
        preconditioner: A low-rank approximation of A, computed for each solve: worth its products where a few
            eigenvalues are far larger than the rest.

    >>> from lightning_ifthpo.curvature import MatrixOperator
    >>> matrix = torch.diag(torch.tensor([1.0, 2.0]))
    >>> ConjugateGradient(max_iterations=2).solve(MatrixOperator(matrix), torch.tensor([1.0, 1.0])).x
    tensor([1.0000, 0.5000])
    """

    preconditioner: Nystrom | None = None

    _may_grow = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.preconditioner, Nystrom | None):
            raise TypeError(f"expected preconditioner to be a Nystrom(rank=...) or None, got {self.preconditioner!r}")
        if self.preconditioner is not None and self.preconditioner.damping != 0.0:
            raise ValueError("a preconditioner takes the damping of the solver; leave its own at zero")

    def _low_rank(self, system: LinearSystem) -> LowRank | None:
        return self.preconditioner.approximation(system) if self.preconditioner else None

    def _run(
        self, system: LinearSystem, start: _Run, residual: Tensor, limits: tuple[int, float], low_rank: LowRank | None
    ) -> _Run:
        x, stiffest, (iterations, tolerance), done = start.x, start.stiffest, limits, 0
        direction = residual if low_rank is None else low_rank.precondition(residual)
        squared, slope = torch.stack([residual @ residual, residual @ direction]).tolist()
        best, least, eps, status = x, squared, torch.finfo(x.dtype).eps, Status.COMPLETE
        while done < iterations and math.sqrt(squared) > tolerance:
            image = system.matvec(direction)
            done += 1
            along = direction @ image
            step = slope / along
            new_residual = residual - step * image
            conditioned = new_residual if low_rank is None else low_rank.precondition(new_residual)
            curvature, length, gain, new_squared, new_slope = torch.stack(
                [along, *map(_squared, (direction, image, new_residual)), new_residual @ conditioned]
            ).tolist()
            ratio = math.sqrt(gain / length) if length else math.nan  # a direction of zero has underflowed
            stiffest = max(stiffest, ratio)
            # rounding of A times this step would change the residual by a hundredth of b
            too_long = slope * stiffest * eps > 1e-2 * abs(curvature) / (math.sqrt(length) or 1.0)
            status = _curvature_status(curvature / length if length else ratio, ratio, stiffest, x.dtype, too_long)
            if status is Status.MAX_ITERATIONS:
                x, squared = best, least
            if status is not Status.COMPLETE:
                break
            x, residual = x + step * direction, new_residual
            direction = conditioned + (new_slope / slope) * direction
            squared, slope = new_squared, new_slope
            if squared < least:
                best, least = x, squared
        return _Run(x, math.sqrt(squared), done, status, stiffest)


@dataclass(frozen=True)
class MinimumResidual(_Krylov):
    """MINRES (Paige and Saunders 1975), for symmetric operators of any sign.

    Minimizes ‖Ax − b‖ over the Krylov space, so that the residual never grows. On a singular system it ends at the
    least-squares solution, and leaves the residual that no x removes. For x0 = 0 that is the shortest one, A⁺b: the
    part of x along the null vector that ended the iteration is removed. Cost and options: as `ConjugateGradient`,
    without a preconditioner.

    >>> from lightning_ifthpo.curvature import MatrixOperator
    >>> matrix = torch.diag(torch.tensor([1.0, -2.0]))
    >>> MinimumResidual(max_iterations=2).solve(MatrixOperator(matrix), torch.tensor([1.0, 1.0])).x
    tensor([ 1.0000, -0.5000])
    """

    def _run(
        self, system: LinearSystem, start: _Run, residual: Tensor, limits: tuple[int, float], low_rank: LowRank | None
    ) -> _Run:
        x, scale, (iterations, tolerance), done = start.x, start.stiffest, limits, 0
        error, status = _length(residual), Status.COMPLETE
        # eps^⅔: among 384 random singular matrices (n up to 300, both dtypes) a smaller value let rounding into x, and
        # a larger one, such as √eps, left out eigenvalues that float32 still resolves
        flat, tiny = torch.finfo(x.dtype).eps ** (2 / 3), torch.finfo(x.dtype).tiny
        # Lanczos vectors v, directions d (the columns of V R⁻¹), and the last two of the rotations that make R
        v_old, v = torch.zeros_like(x), residual / error
        d_old, d = torch.zeros_like(x), torch.zeros_like(x)
        (cos_old, sin_old), (cos, sin), beta = (1.0, 0.0), (1.0, 0.0), 0.0
        while done < iterations and abs(error) > tolerance:
            image = system.matvec(v) - beta * v_old
            done += 1
            projection = v @ image
            image = image - projection * v
            alpha, beta_new = torch.stack([projection, torch.linalg.vector_norm(image)]).tolist()
            scale = max(scale, math.hypot(beta, alpha, beta_new))
            second, first = sin_old * beta, cos * cos_old * beta + sin * alpha
            corner = cos * alpha - sin * cos_old * beta
            diagonal = math.hypot(corner, beta_new)
            if math.isnan(diagonal):
                status = Status.NONFINITE
                break
            if math.hypot(corner, cos * beta_new) <= flat * scale:  # ‖Ar‖ / ‖r‖: the residual is a null vector
                x = _without(x, residual)
                break
            d_new = (v - first * d - second * d_old) / diagonal
            if _length(d_new * (scale * flat)) > 1.0:  # A maps the direction to a vector of length one
                x = _without(x, d_new)
                break
            (cos_old, sin_old), (cos, sin) = (cos, sin), (corner / diagonal, beta_new / diagonal)
            d_old, d = d, d_new
            x = x + (cos * error) * d
            v_old, v, beta = v, image / max(beta_new, tiny), beta_new
            residual = sin**2 * residual - (error * sin * cos) * v
            error *= -sin
        return _Run(x, abs(error), done, status, scale)


def _start(system: LinearSystem, b: Tensor, x0: Tensor | None) -> tuple[Tensor, Tensor, int]:
    """Returns the first iterate, its residual, and the number of products used; a start worse than zero is dropped."""
    if x0 is None or not bool(x0.any()):
        return torch.zeros_like(b), b, 0
    residual = system.residual(x0, b)
    return (x0, residual, 1) if _length(residual) <= _length(b) else (torch.zeros_like(b), b, 1)


def _curvature_status(quotient: float, image: float, stiffest: float, dtype: torch.dtype, too_long: bool) -> Status:
    """Returns COMPLETE where curvature is positive, else how the solve ends.

    Args:
        quotient: pᵀAp / pᵀp for a direction p.
        image: ‖Ap‖ / ‖p‖.
        stiffest: The largest of these ratios so far.
        dtype: That of the products.
        too_long: Whether a step along p would be too long for the dtype.
    """
    if not math.isfinite(quotient) or not math.isfinite(image):
        return Status.NONFINITE
    if is_negative(quotient, stiffest, dtype):
        return Status.NEGATIVE_CURVATURE
    eps = torch.finfo(dtype).eps
    if quotient > 10.0 * eps * stiffest:  # ten eps: rounding of the product
        return Status.MAX_ITERATIONS if too_long else Status.COMPLETE
    # A semi-definite A with pᵀAp <= √eps ‖A‖ has ‖Ap‖ <= eps^¼ ‖A‖. A longer Ap is a sum over both signs.
    return Status.MAX_ITERATIONS if image <= eps**0.25 * stiffest else Status.NEGATIVE_CURVATURE


def _squared(vector: Tensor) -> Tensor:
    square: Tensor = vector @ vector
    return square


def _length(vector: Tensor) -> float:
    return float(torch.linalg.vector_norm(vector))


def _without(x: Tensor, direction: Tensor) -> Tensor:
    """Returns x without its part along a direction."""
    unit = direction / torch.linalg.vector_norm(direction)
    rest: Tensor = x - (unit @ x) * unit
    return rest
