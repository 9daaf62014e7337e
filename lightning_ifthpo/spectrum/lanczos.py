"""The largest and smallest eigenvalues."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_ifthpo.core.random_state import Stream, generator_of
from lightning_ifthpo.curvature.base import CurvatureOperator
from lightning_ifthpo.spectrum.basis import KrylovBasis, RitzPairs


@dataclass(frozen=True)
class ExtremeEigenvalues:
    """The largest and smallest eigenvalues of an operator.

    Attributes:
        largest: [k], descending; largest[0] is λ_max; NaN for a non-finite operator.
        smallest: [k], ascending; smallest[0] is λ_min.
        largest_bounds: [k]; an eigenvalue lies within this distance of each of `largest`.
        smallest_bounds: [k]; the same for `smallest`.
        products: Products with the operator.
        converged: Whether each bound is at most rtol · max(|λ_max|, |λ_min|); False for NaN.
        largest_vectors: [k, n]; unit eigenvectors of `largest`; None if they were not asked for.
        smallest_vectors: [k, n]; the same for `smallest`.
    """

    largest: Tensor
    smallest: Tensor
    largest_bounds: Tensor
    smallest_bounds: Tensor
    products: int
    converged: bool
    largest_vectors: Tensor | None = None
    smallest_vectors: Tensor | None = None

    @property
    def relative_residual(self) -> float:
        """The largest bound over max(|λ_max|, |λ_min|); zero for a zero operator."""
        scale = float(torch.stack([self.largest[0], self.smallest[0]]).abs().amax())
        bound = float(torch.cat([self.largest_bounds, self.smallest_bounds]).amax())
        return bound / scale if scale else bound


def lanczos(
    operator: CurvatureOperator,
    *,
    k: int = 1,
    min_iterations: int = 1,
    max_iterations: int = 100,
    rtol: float = 1e-6,
    start: Tensor | None = None,
    vectors: bool = False,
    generator: torch.Generator | None = None,
) -> ExtremeEigenvalues:
    """Returns the k largest and the k smallest eigenvalues, by Lanczos with full reorthogonalization.

    Ritz values lie inside the spectrum, so that a negative one proves negative curvature. A repeated eigenvalue is
    found once: a Krylov space has one vector per distinct eigenvalue. For an operator that has changed little, the sum
    of the last eigenvectors is a good start.

    Cost: the products, O(n · iterations²) other operations, and memory iterations · n.

    Args:
        operator: A, symmetric, on vectors [n].
        k: Number of eigenvalues at each end, at most n.
        min_iterations: Products at least; more of them resolve an end that is much nearer to zero than the other.
        max_iterations: Products at most.
        rtol: Stop when all bounds are below rtol times the largest magnitude.
        start: First vector, [n]; a random one if None.
        vectors: Whether to return the eigenvectors.
        generator: CPU generator that draws the random vectors; one with a fixed seed if None.

    Raises:
        ValueError: If k does not lie in 1 … n, or max_iterations is less than k or min_iterations.

    >>> from lightning_ifthpo.curvature import MatrixOperator
    >>> result = lanczos(MatrixOperator(torch.diag(torch.tensor([1.001, -1.002, 0.3, 0.1]))))
    >>> round(result.largest.item(), 4), round(result.smallest.item(), 4), result.converged
    (1.001, -1.002, True)
    """
    if not 1 <= k <= operator.size:
        raise ValueError(f"expected 1 <= k <= {operator.size} (the dimension), got {k}")
    if max_iterations < max(k, min_iterations):
        raise ValueError(f"expected max_iterations >= {k = } and >= {min_iterations = }, got {max_iterations}")
    basis = KrylovBasis(operator, start, generator or generator_of(Stream.START_VECTORS))
    while True:
        basis.extend()
        ritz = basis.ritz()
        # A given start may lie in an invariant space, which shows nothing of the rest of the spectrum. Then the vectors
        # after it must converge too; to 1e-2 only, because they need only show whether an eigenvalue lies beyond.
        latest = ritz if basis.fresh == basis.products else basis.ritz(basis.products - basis.fresh)
        blind = start is not None and basis.exhausted and basis.fresh == basis.products < operator.size
        scale = float(ritz.values.abs().amax())
        close = _bounds_within(ritz, k, rtol * scale) and _bounds_within(latest, 1, max(rtol, 1e-2) * scale)
        converged = close and not blind and basis.products >= max(k, min(min_iterations, operator.size))
        if converged or not basis.finite or basis.products >= min(max_iterations, operator.size):
            break
    return ExtremeEigenvalues(
        largest=ritz.values.flip(0)[:k],
        smallest=ritz.values[:k],
        largest_bounds=ritz.bounds.flip(0)[:k],
        smallest_bounds=ritz.bounds[:k],
        products=basis.products,
        converged=converged,
        largest_vectors=basis.combine(ritz.coefficients.flip(1)[:, :k]) if vectors else None,
        smallest_vectors=basis.combine(ritz.coefficients[:, :k]) if vectors else None,
    )


def _bounds_within(ritz: RitzPairs, k: int, tolerance: float) -> bool:
    return bool((torch.cat([ritz.bounds[-k:], ritz.bounds[:k]]) <= tolerance).all())
