"""An orthonormal basis of a Krylov space, in which the operator is a small tridiagonal matrix."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_ifthpo.curvature.base import CurvatureOperator


@dataclass(frozen=True)
class RitzPairs:
    """Eigenvalues of an operator restricted to a Krylov space.

    Attributes:
        values: [size], ascending.
        bounds: [size]; an eigenvalue of the operator lies within this distance of each value. It is the residual
            ‖Ay − θy‖ = β|s| plus rounding; β is the next off-diagonal entry, s the eigenvector's last (Paige 1971).
        weights: [size]; squared cosine of each Ritz vector with the first basis vector; they sum to one.
        coefficients: [size, size]; the columns are the Ritz vectors in the basis.
    """

    values: Tensor
    bounds: Tensor
    weights: Tensor
    coefficients: Tensor


class KrylovBasis:
    """Lanczos vectors of a symmetric operator, fully reorthogonalized.

    Without reorthogonalization ghost copies of λ_max appear. When the Krylov space is exhausted, a random direction
    orthogonal to it continues the basis.

    Cost: one product per vector, O(n · size²) operations to orthogonalize, and memory size · n.

    Args:
        operator: A, symmetric, on vectors [n].
        start: First vector, [n]; a random one if it is None or zero.
        generator: CPU generator of the random vectors, so that every device draws the same.

    Attributes:
        products: Products with the operator so far, one for each basis vector.
        finite: False if the last product had a NaN or an infinity.
        exhausted: Whether the basis spans an invariant space, up to rounding.
        fresh: Vectors since the last exhaustion; those before them span an invariant space.
    """

    def __init__(self, operator: CurvatureOperator, start: Tensor | None, generator: torch.Generator) -> None:
        self._operator = operator
        self._generator = generator
        self._diagonal: list[float] = []
        self._off_diagonal: list[float] = []
        self._rows = torch.empty(0, operator.size, dtype=operator.dtype, device=operator.device)
        self._scale = 0.0
        self._next = start.to(operator.device, operator.dtype) if start is not None and start.any() else None
        self.products = 0
        self.finite = True
        self.exhausted = False
        self.fresh = 0

    def extend(self) -> None:
        """Adds one vector; takes one product."""
        vector = self._next
        if vector is None:
            vector = self._orthogonalize(random_vector(self._operator, self._generator))
        vector = vector / length_of(vector)
        product = self._operator.matvec(vector)
        if self.products == len(self._rows):  # doubling: each row is copied about once
            longer = self._rows.new_empty(min(max(4, 2 * len(self._rows)), self._operator.size), self._operator.size)
            longer[: len(self._rows)] = self._rows
            self._rows = longer
        self._rows[self.products] = vector
        self.products += 1
        residual = self._orthogonalize(product)
        diagonal, norm, length = torch.stack([vector @ product, length_of(residual), length_of(product)]).tolist()
        self.finite = math.isfinite(length)
        self._scale = max(self._scale, length)
        self.fresh = 1 if self.exhausted else self.fresh + 1
        # a residual below ten rounding errors of the largest product is taken for rounding
        self.exhausted = norm <= 10 * torch.finfo(residual.dtype).eps * self._scale
        self._diagonal.append(diagonal)
        self._off_diagonal.append(0.0 if self.exhausted else norm)
        self._next = None if self.exhausted else residual

    def ritz(self, first: int = 0, last: int | None = None) -> RitzPairs:
        """Returns the eigenpairs of the tridiagonal matrix of the vectors `first` to `last` − 1, NaN if not finite."""
        matrix = torch.diag(torch.tensor(self._diagonal[first:last], dtype=torch.float64))
        off_diagonal = torch.tensor(self._off_diagonal[first:last], dtype=torch.float64)
        if not self.finite:
            nothing = torch.full_like(matrix, math.nan)
            return RitzPairs(nothing[0], nothing[0], nothing[0], nothing)
        matrix.diagonal(-1).copy_(off_diagonal[:-1])  # eigh reads the lower triangle only
        values, vectors = torch.linalg.eigh(matrix)
        rounding = torch.finfo(self._rows.dtype).eps * float(values.abs().amax())  # error of the products
        bounds = off_diagonal[-1] * vectors[-1].abs() + rounding
        return RitzPairs(values, bounds, vectors[0].square(), vectors)

    def combine(self, coefficients: Tensor) -> Tensor:
        """Returns vectors [k, n] from coefficients [size, k] in this basis."""
        return coefficients.T.to(self._rows) @ self._rows[: self.products]

    def _orthogonalize(self, vector: Tensor) -> Tensor:
        rows = self._rows[: self.products]
        for _ in range(2):  # twice is enough (Giraud, Langou, Rozložník 2005)
            vector = vector - (rows @ vector) @ rows
        return vector


def length_of(vector: Tensor) -> Tensor:
    """Returns the Euclidean norm, a scalar; it scales first, so that no square underflows or overflows."""
    largest = vector.abs().amax()
    scale = torch.where(largest > 0, largest, 1.0)
    norm: Tensor = torch.linalg.vector_norm(vector / scale) * scale
    return norm


def random_vector(operator: CurvatureOperator, generator: torch.Generator) -> Tensor:
    """Returns standard normal numbers [n] on the operator's device, drawn on the CPU in float64."""
    return torch.randn(operator.size, dtype=torch.float64, generator=generator).to(operator.device, operator.dtype)
