"""Nyström approximations: low-rank curvature from products with a few random directions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_ifthpo.core.random_state import Stream, derive_seed
from lightning_ifthpo.solvers.base import Solver, SolveResult, Status, at_least, is_negative, status_without_tolerance
from lightning_ifthpo.solvers.system import LinearSystem


@dataclass(frozen=True)
class Nystrom(Solver):
    """(U Λ Uᵀ + δI)⁻¹ b, with the r largest eigenvalues of A as seen in r random directions (Frangella et al. 2023).

    For positive semi-definite curvature with few large eigenvalues. The inverse is 1/δ outside of the r directions, so
    the damping should be as large as the eigenvalues that are left out. Directions of negative curvature are left out
    too. Where A + δI is negative along one of them and the residual is not rounding, the status is NEGATIVE_CURVATURE;
    the sign of A itself does not matter.

    Cost: r products and r vectors of memory; one extra product measures the residual.

    Attributes:
        rank: r.
        seed: Seed of the random directions, which are the same at every solve.

    >>> from lightning_ifthpo.curvature import MatrixOperator
    >>> matrix = torch.diag(torch.tensor([4.0, 1.0, 0.0]))
    >>> Nystrom(rank=2, damping=1.0).solve(MatrixOperator(matrix), torch.ones(3)).x
    tensor([0.2000, 0.5000, 1.0000])
    """

    rank: int = at_least(1, default=20)
    seed: int = at_least(0, default=0)

    def approximation(self, system: LinearSystem) -> LowRank:
        """Returns A + δI with A approximated from r products."""
        operator = system.operator
        damping = torch.as_tensor(system.damping, dtype=operator.dtype, device=operator.device)
        scale = torch.where(damping > 0.0, damping, 1.0).rsqrt().expand(operator.size)
        rank = min(self.rank, operator.size)
        generator = torch.Generator(operator.device).manual_seed(derive_seed(Stream.SKETCH, seed=self.seed))
        random = torch.randn(operator.size, rank, generator=generator, dtype=operator.dtype, device=operator.device)
        directions = torch.linalg.qr(random).Q
        images = torch.stack([scale * operator.matvec(scale * column) for column in directions.T], dim=1)
        damped = bool((damping > 0.0).all())
        if not bool(torch.isfinite(images).all()):
            return LowRank(images[:, :0], images.new_zeros(0), torch.nan * scale, damped, rank, negative=False)
        core = directions.T @ images
        values, vectors = torch.linalg.eigh((core + core.T) / 2)
        largest = values.abs().amax()
        kept = values > rank * torch.finfo(operator.dtype).eps * largest
        half = images @ (vectors[:, kept] / values[kept].sqrt())  # A ≈ half · halfᵀ
        basis, singular, _ = torch.linalg.svd(half, full_matrices=False)
        shift = float(damped)  # the damping in units of itself
        negative = is_negative(float(values[0]) + shift, float(largest) + shift, operator.dtype)
        return LowRank(basis, singular.square(), scale, damped, rank, negative)

    def _solve(self, system: LinearSystem, b: Tensor, x0: Tensor | None) -> SolveResult:
        approximation = self.approximation(system)
        if not approximation.damped and approximation.products < len(b):
            raise ValueError(
                f"Nystrom(rank={self.rank}) needs damping > 0 on {len(b)} parameters, because it divides by damping "
                "outside of its directions; pass damping, or rank >= the number of parameters"
            )
        x = approximation.solve(b)
        residual = system.relative_residual(x, b)
        status = status_without_tolerance(residual, b.dtype)
        if approximation.negative and status is not Status.CONVERGED:
            status = Status.NEGATIVE_CURVATURE
        return SolveResult(x, residual, approximation.products, status, extra_products=1)


@dataclass(frozen=True)
class LowRank:
    """S⁻¹ (U Λ Uᵀ + I) S⁻¹ with a diagonal S = δ^{-½}, or U Λ Uᵀ where there is no damping.

    Attributes:
        basis: U, orthonormal, [n, r].
        values: Λ > 0, [r], descending.
        scale: S, [n]; ones without damping.
        damped: Whether there is damping.
        products: Products with A that were used.
        negative: Whether A + δI is negative along a direction that was left out.
    """

    basis: Tensor
    values: Tensor
    scale: Tensor
    damped: bool
    products: int
    negative: bool

    @property
    def largest(self) -> float:
        """A lower bound of the largest curvature of A that was seen; 0 if there is none."""
        return float(self.values[0] / self.scale.square().amax()) if len(self.values) else 0.0

    def solve(self, b: Tensor) -> Tensor:
        """Returns its inverse times b: [n]; without damping its pseudo-inverse."""
        right = self.scale * b
        seen = self.basis.T @ right
        rest = right - self.basis @ seen if self.damped else torch.zeros_like(right)
        return self.scale * (self.basis @ (seen / (self.values + float(self.damped))) + rest)

    def precondition(self, v: Tensor) -> Tensor:
        """Returns P⁻¹v: [n], where P⁻¹ makes the r eigenvalues equal and leaves the others as they are."""
        if not len(self.values):
            return self.scale.square() * v
        right, values = self.scale * v, self.values + float(self.damped)
        return self.scale * (right + self.basis @ ((self.basis.T @ right) * (values[-1] / values - 1.0)))
