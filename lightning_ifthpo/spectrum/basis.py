"""An orthonormal basis of a Krylov space, and the operator as a small tridiagonal matrix in it."""

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
        bounds: [size]; some eigenvalue of the operator lies within this distance of each value: ‖Ay − θy‖ = β|s|, with
            β the next off-diagonal entry and s the last entry of the eigenvector (Paige 1971), plus rounding.
        weights: [size]; squared cosine of each Ritz vector with the first basis vector; they sum to one.
        coefficients: [size, size]; the Ritz vectors in the basis, one a column.
    """

    values: Tensor
    bounds: Tensor
    weights: Tensor
    coefficients: Tensor


class KrylovBasis:
    """Lanczos vectors of a symmetric operator, fully reorthogonalized.

    Without reorthogonalization ghost copies of λ_max appear; with it the work beside the products is O(n · size²), and
    the memory size · n. When the Krylov space is exhausted a random direction outside of it continues the basis.

    Args:
        operator: A, symmetric, on vectors [n].
        start: First vector, [n]; a random one where not given, or zero.
        generator: CPU generator of the random vectors, so that every device draws the same.

    Attributes:
        products: Products with the operator that were spent, one for each basis vector.
        finite: False once a product held a NaN or an infinity.
        exhausted: Whether the space spanned so far is invariant, up to rounding.
        fresh: Vectors since the last exhaustion; what came before spans an invariant space.
    """

    def __init__(self, operator: CurvatureOperator, start: Tensor | None, generator: torch.Generator) -> None:
        self._operator = operator
        self._generator = generator
        self._diagonal: list[float] = []
        self._off_diagonal: list[float] = []
        self._rows = torch.empty(0, operator.size, dtype=operator.dtype, device=operator.device)
        self._scale = 0.0
        self._next = None if start is None or not bool(start.any()) else start.to(operator.device, operator.dtype)
        self.products = 0
        self.finite = True
        self.exhausted = False
        self.fresh = 0

    def extend(self) -> None:
        """Adds one vector, by one product."""
        vector = self._next
        if vector is None:
            vector = self._orthogonalize(random_vector(self._operator, self._generator))
        vector = vector / length_of(vector)
        product = self._operator.matvec(vector)
        self._append(vector)
        residual = self._orthogonalize(product)
        diagonal, norm, length = torch.stack([vector @ product, length_of(residual), length_of(product)]).tolist()
        self.finite = math.isfinite(length)
        self._scale = max(self._scale, length)
        # below this the residual is rounding
        self.fresh = 1 if self.exhausted else self.fresh + 1
        self.exhausted = norm <= 10 * torch.finfo(residual.dtype).eps * self._scale
        self._diagonal.append(diagonal)
        self._off_diagonal.append(0.0 if self.exhausted else norm)
        self._next = None if self.exhausted else residual

    def ritz(self, first: int = 0, last: int | None = None) -> RitzPairs:
        """Returns the eigenvalues of the tridiagonal matrix of the vectors from `first` to before `last`."""
        diagonal, off_diagonal = self._diagonal[first:last], self._off_diagonal[first:last]
        size = len(diagonal)
        if not self.finite:
            nothing = torch.full((size,), math.nan, dtype=torch.float64)
            return RitzPairs(nothing, nothing, nothing, torch.full((size, size), math.nan, dtype=torch.float64))
        matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
        if size > 1:
            off = torch.tensor(off_diagonal[:-1], dtype=torch.float64)
            matrix += torch.diag(off, 1) + torch.diag(off, -1)
        values, vectors = torch.linalg.eigh(matrix)
        rounding = torch.finfo(self._rows.dtype).eps * float(values.abs().amax())  # of the products themselves
        bounds = off_diagonal[-1] * vectors[-1].abs() + rounding
        return RitzPairs(values, bounds, vectors[0].square(), vectors)

    def combine(self, coefficients: Tensor) -> Tensor:
        """Returns vectors [k, n] from coefficients [size, k] in this basis."""
        return coefficients.T.to(self._rows) @ self._rows[: self.products]

    def _append(self, vector: Tensor) -> None:
        if self.products == len(self._rows):  # doubled, so that appending copies each row about once
            longer = self._rows.new_empty(min(max(4, 2 * len(self._rows)), self._operator.size), self._operator.size)
            longer[: len(self._rows)] = self._rows
            self._rows = longer
        self._rows[self.products] = vector
        self.products += 1

    def _orthogonalize(self, vector: Tensor) -> Tensor:
        rows = self._rows[: self.products]
        for _ in range(2):  # twice is enough (Giraud, Langou, Rozložník 2005)
            vector = vector - (rows @ vector) @ rows
        return vector


def length_of(vector: Tensor) -> Tensor:
    """Returns the Euclidean norm, a scalar, without underflow or overflow of squares."""
    largest = vector.abs().amax()
    scale = torch.where(largest > 0, largest, 1.0)
    norm: Tensor = torch.linalg.vector_norm(vector / scale) * scale
    return norm


def random_vector(operator: CurvatureOperator, generator: torch.Generator) -> Tensor:
    """Returns standard normal numbers, [n], from a CPU generator, on the operator's device."""
    vector = torch.randn(operator.size, dtype=torch.float64, generator=generator)
    return vector.to(operator.device, operator.dtype)


def generator_or_default(generator: torch.Generator | None) -> torch.Generator:
    """Returns the generator, or one with a fixed seed, so that the global random state is left alone."""
    return torch.Generator().manual_seed(0) if generator is None else generator
