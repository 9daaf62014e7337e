"""Eigenvalues of a curvature operator from a few products."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_ifthpo.curvature.operator import CurvatureOperator


@dataclass(frozen=True)
class LanczosResult:
    """Both ends of a spectrum.

    Attributes:
        largest: [k], descending; largest[0] is λ_max.
        smallest: [k], ascending; smallest[0] is λ_min.
        largest_bounds: [k]; an eigenvalue lies within this distance of each of `largest`.
        smallest_bounds: [k]; the same for `smallest`.
        products: Products with the operator that were spent.
        converged: Whether each bound is at most rtol · max(|λ_max|, |λ_min|). Never true for a non-finite operator,
            whose eigenvalues are reported as NaN.
    """

    largest: Tensor
    smallest: Tensor
    largest_bounds: Tensor
    smallest_bounds: Tensor
    products: int
    converged: bool


def lanczos(
    operator: CurvatureOperator,
    *,
    k: int = 1,
    max_iterations: int = 100,
    rtol: float = 1e-6,
    start: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> LanczosResult:
    """Returns the k largest and the k smallest eigenvalues, by Lanczos with full reorthogonalization.

    The residual bound of a Ritz value θ with Ritz vector y is ‖Ay − θy‖ = β|s|, with β the next off-diagonal entry and
    s the last entry of its eigenvector (Paige 1971): some eigenvalue lies within it. Ritz values lie inside the
    spectrum, so a negative one proves negative curvature. Without reorthogonalization ghost copies of λ_max appear;
    with it the cost beside the products is O(n · iterations²) and the memory iterations · n.

    Args:
        operator: A, symmetric, on vectors [n].
        k: Eigenvalues wanted at each end; at most n.
        max_iterations: Products to spend at most.
        rtol: Stop when all bounds are below rtol times the largest magnitude.
        start: First vector, [n]; a random one where not given.
        generator: CPU generator that draws the random vectors; a fixed seed where not given.

    Raises:
        ValueError: If k does not lie in 1 … n, or max_iterations < k.

    >>> from lightning_ifthpo.curvature import MatrixOperator
    >>> result = lanczos(MatrixOperator(torch.diag(torch.tensor([1.001, -1.002, 0.3, 0.1]))))
    >>> round(result.largest.item(), 4), round(result.smallest.item(), 4), result.converged
    (1.001, -1.002, True)
    """
    if not 1 <= k <= operator.size:
        raise ValueError(f"expected 1 <= k <= {operator.size} (the dimension), got {k}")
    if max_iterations < k:
        raise ValueError(f"expected max_iterations >= k = {k}, got {max_iterations}")
    basis = _Basis(operator, start, generator)
    while True:
        basis.extend()
        values, bounds = basis.ritz()
        wanted = torch.cat([bounds[-k:], bounds[:k]])
        settled = len(values) >= k and bool((wanted <= rtol * values.abs().amax()).all())
        # A given start may lie in an invariant subspace, and know nothing of the rest of the spectrum.
        converged = settled and not (basis.confined and basis.products < operator.size)
        if converged or not basis.finite or basis.products >= min(max_iterations, operator.size):
            break
    return LanczosResult(
        largest=values.flip(0)[:k],
        smallest=values[:k],
        largest_bounds=bounds.flip(0)[:k],
        smallest_bounds=bounds[:k],
        products=basis.products,
        converged=converged,
    )


class _Basis:
    """An orthonormal Krylov basis and the tridiagonal matrix of the operator in it."""

    def __init__(self, operator: CurvatureOperator, start: Tensor | None, generator: torch.Generator | None) -> None:
        self._operator = operator
        self._generator = torch.Generator().manual_seed(0) if generator is None else generator
        self._diagonal: list[float] = []
        self._off_diagonal: list[float] = []
        self._vectors: list[Tensor] = []
        self._scale = 0.0
        self._next = None if start is None or not bool(start.any()) else start.to(operator.dtype)
        self.products = 0
        self.finite = True
        self._given = self._next is not None
        self.confined = False

    def extend(self) -> None:
        """Adds one vector, by one product."""
        vector = self._random() if self._next is None else self._next
        vector = vector / torch.linalg.vector_norm(vector)
        product = self._operator.matvec(vector)
        self.products += 1
        self._vectors.append(vector)
        residual = self._orthogonalized(product)
        diagonal, norm, length = torch.stack(
            [vector @ product, torch.linalg.vector_norm(residual), torch.linalg.vector_norm(product)]
        ).tolist()
        self.finite = math.isfinite(length)
        self._scale = max(self._scale, length)
        # below this the residual is rounding: the Krylov space is invariant, and a fresh direction must be drawn
        exhausted = norm <= 10 * torch.finfo(residual.dtype).eps * self._scale
        self.confined, self._given = exhausted and self._given, self._given and not exhausted
        self._diagonal.append(diagonal)
        self._off_diagonal.append(0.0 if exhausted else norm)
        self._next = None if exhausted else residual

    def ritz(self) -> tuple[Tensor, Tensor]:
        """Returns the Ritz values, ascending, and the residual bound of each."""
        size = len(self._diagonal)
        if not self.finite:
            return torch.full((size,), math.nan), torch.full((size,), math.nan)
        matrix = torch.diag(torch.tensor(self._diagonal, dtype=torch.float64))
        off = torch.tensor(self._off_diagonal[:-1], dtype=torch.float64)
        if size > 1:
            matrix += torch.diag(off, 1) + torch.diag(off, -1)
        values, vectors = torch.linalg.eigh(matrix)
        return values, self._off_diagonal[-1] * vectors[-1].abs()

    def _orthogonalized(self, vector: Tensor) -> Tensor:
        for _ in range(2):  # twice is enough (Giraud, Langou, Rozložník 2005)
            for other in self._vectors:
                vector = vector - (other @ vector) * other
        return vector

    def _random(self) -> Tensor:
        vector = torch.randn(self._operator.size, dtype=torch.float64, generator=self._generator)
        return self._orthogonalized(vector.to(self._operator.device, self._operator.dtype))
