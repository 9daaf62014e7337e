"""The interface of curvature for solvers and spectrum code: a fixed symmetric linear map, used through its products."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from lightning_ifthpo.core.graph import custom_functions, second_derivatives_of
from lightning_ifthpo.core.loss import Loss, LossGraph
from lightning_ifthpo.curvature.counting import as_one_product


class CurvatureOperator(ABC):
    """A symmetric linear map A on vectors [n], the same map at every product."""

    size: int
    dtype: torch.dtype
    device: torch.device

    @abstractmethod
    def _product(self, v: Tensor) -> Tensor:
        """Returns A v for a checked v: [n], in memory of its own, which callers may write to."""

    def matvec(self, v: Tensor) -> Tensor:
        """Returns A v, [n].

        Raises:
            ValueError: If v does not have shape [n].
        """
        if v.shape != (self.size,):
            raise ValueError(f"expected v of shape ({self.size},), got {tuple(v.shape)}")
        v = v.to(self.dtype)
        image = as_one_product(self._product, v)
        return image.clone() if _share_memory(image, v) else image  # callers write to products

    def quadratic(self, v: Tensor) -> Tensor:
        """Returns vᵀ A v, a scalar, for v: [n]."""
        return v @ self.matvec(v)

    def to_dense(self) -> Tensor:
        """Returns A as a matrix, [n, n]; n products."""
        identity = torch.eye(self.size, dtype=self.dtype, device=self.device)
        return torch.stack([self.matvec(row) for row in identity], dim=1)

    def damped(self, delta: float | Tensor) -> CurvatureOperator:
        """Returns A + δI, or A + diag(δ) for δ: [n]; δ in loss / parameter²."""
        return DampedOperator(self, delta)

    def preconditioned(self, preconditioner: Tensor) -> CurvatureOperator:
        """Returns P^½ A P^½ for a diagonal P ≥ 0: [n]; it has the eigenvalues of PA."""
        return PreconditionedOperator(self, preconditioner)


def _share_memory(left: Tensor, right: Tensor) -> bool:
    return left.untyped_storage().data_ptr() == right.untyped_storage().data_ptr()


class LossOperator(CurvatureOperator):
    """The curvature of an inner loss L(λ, w) in w, with the mixed derivatives of w and λ.

    If examples are spread over processes, each process computes the product of its share, and `Loss.combine` sums them
    by one collective. All processes must ask for the same products in the same order.

    A subclass sets `_graph`, this process's `Loss.graph`, or defines `_own_loss`, `_own_gradient` and
    `_own_mixed_product`.

    Args:
        loss: L with its parameters w, together [n].
    """

    _graph: LossGraph

    def __init__(self, loss: Loss) -> None:
        self._loss = loss
        self.size, self.dtype, self.device = loss.space.size, loss.space.dtype, loss.space.device

    @cached_property
    def loss(self) -> Tensor:
        """L, a scalar, detached."""
        return self._loss.combine(self._own_loss())

    @cached_property
    def gradient(self) -> Tensor:
        """∂L/∂w, [n], detached."""
        return self._loss.combine(self._own_gradient())

    @property
    def custom_functions(self) -> list[str]:
        """Names of the subclasses of `torch.autograd.Function` in the loss; their second derivatives may be wrong."""
        return custom_functions([self._own_loss()])

    def mixed_product(
        self, v: Tensor, hyperparameters: Sequence[Tensor], parts: Sequence[tuple[float, Tensor]] = ()
    ) -> list[Tensor | None]:
        """Returns (∂²L/∂w∂λᵀ)ᵀ v for v: [n], shaped like the hyperparameters; `None` where it is zero by structure.

        It is exact for every curvature except finite differences. Cost: one to two gradients; see also
        `GaussNewtonOperator`.

        Args:
            v: [n].
            hyperparameters: λ.
            parts: v as a sum of numbers times vectors, if `matvec` was called for all of them. It may save work. Do not
                write to them in between behind the version counter, by `.data`.
        """
        with second_derivatives_of(self._loss.name):
            own = self._own_mixed_product(v, hyperparameters, parts)
        return self._loss.combine_list(own, hyperparameters)

    def _product(self, v: Tensor) -> Tensor:
        with second_derivatives_of(self._loss.name):
            own = self._own_product(v)
        return self._loss.combine(own)

    @abstractmethod
    def _own_product(self, v: Tensor) -> Tensor:
        """Returns this process's part of A v, [n], for `Loss.combine`."""

    def _own_loss(self) -> Tensor:
        return self._graph.value

    def _own_gradient(self) -> Tensor:
        return self._graph.gradient

    def _own_mixed_product(
        self, v: Tensor, hyperparameters: Sequence[Tensor], parts: Sequence[tuple[float, Tensor]]
    ) -> list[Tensor | None]:
        return self._graph.mixed_product(v, hyperparameters)


class InvertibleOperator(CurvatureOperator):
    """A curvature with a closed form of its damped inverse."""

    @abstractmethod
    def solve(self, b: Tensor, delta: float | Tensor) -> Tensor:
        """Returns (A + δI)⁻¹ b, or (A + diag(δ))⁻¹ b for δ: [n], for b: [n]; subclasses say where they approximate."""


class MatrixOperator(CurvatureOperator):
    """A symmetric matrix [n, n] as an operator.

    Raises:
        ValueError: If the matrix is not square and symmetric.

    >>> MatrixOperator(torch.diag(torch.tensor([1.0, 2.0]))).matvec(torch.tensor([1.0, 1.0]))
    tensor([1., 2.])
    """

    def __init__(self, matrix: Tensor) -> None:
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
            raise ValueError(f"expected a square matrix, got shape {tuple(matrix.shape)}")
        # sqrt(eps): a matrix symmetric in exact arithmetic differs by a few eps from its transpose
        tolerance = torch.finfo(matrix.dtype).eps ** 0.5 * matrix.abs().amax()
        if not bool(((matrix - matrix.T).abs() <= tolerance).all()):
            raise ValueError("expected a symmetric matrix; take (M + M.T) / 2, or M.T @ M for a least-squares problem")
        self.matrix = matrix
        self.size, self.dtype, self.device = len(matrix), matrix.dtype, matrix.device

    def _product(self, v: Tensor) -> Tensor:
        return self.matrix @ v


class DampedOperator(CurvatureOperator):
    """A + δI, or A + diag(δ) for δ: [n], in loss / parameter²; raises ValueError for δ of another shape."""

    def __init__(self, operator: CurvatureOperator, delta: float | Tensor) -> None:
        if isinstance(delta, Tensor) and delta.ndim > 0 and delta.shape != (operator.size,):
            raise ValueError(f"expected damping of shape ({operator.size},), got {tuple(delta.shape)}")
        self.operator = operator
        self.delta = delta.to(operator.device, operator.dtype) if isinstance(delta, Tensor) else delta
        self.size, self.dtype, self.device = operator.size, operator.dtype, operator.device
        self._factor = torch.as_tensor(self.delta, dtype=self.dtype, device=self.device)

    def _product(self, v: Tensor) -> Tensor:
        return self.operator.matvec(v).addcmul_(self._factor, v)


class PreconditionedOperator(CurvatureOperator):
    """P^½ A P^½ for a diagonal P: [n], which is symmetric and similar to PA; raises ValueError for another shape."""

    def __init__(self, operator: CurvatureOperator, preconditioner: Tensor) -> None:
        if preconditioner.shape != (operator.size,):
            expected, shape = (operator.size,), tuple(preconditioner.shape)
            raise ValueError(f"expected a preconditioner of shape {expected}, got {shape}")
        self.operator = operator
        self._root = preconditioner.sqrt()
        self.size, self.dtype, self.device = operator.size, operator.dtype, operator.device

    def _product(self, v: Tensor) -> Tensor:
        return self._root * self.operator.matvec(self._root * v)
