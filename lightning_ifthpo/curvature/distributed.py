"""Curvature of a loss whose examples are spread over processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TypeAlias

import torch
from torch import Tensor

from lightning_ifthpo.curvature.base import CurvatureOperator, LossOperator

AllReduce: TypeAlias = Callable[[Tensor], Tensor]
"""Returns the sum of a tensor over all processes, the same to the last bit in each of them."""


class SummedProducts(CurvatureOperator):
    """Σ Aᵣ, of which each process knows one.

    All processes must ask for the same products, at the same time. One collective a product, of one flat tensor.

    Args:
        share: Aᵣ, of this process.
        all_reduce: Sums over the processes.
    """

    def __init__(self, share: CurvatureOperator, all_reduce: AllReduce) -> None:
        self._share = share
        self._all_reduce = all_reduce
        self.size, self.dtype, self.device = share.size, share.dtype, share.device

    def _product(self, v: Tensor) -> Tensor:
        return self._all_reduce(self._share.matvec(v))


class SummedOperator(SummedProducts, LossOperator):
    """Σ Aᵣ, the curvature of a loss L = Σ Lᵣ of which each process knows its share.

    Args:
        share: Aᵣ, of this process.
        all_reduce: Sums over the processes.

    >>> from lightning_ifthpo.curvature import HessianOperator
    >>> w = torch.tensor([1.0], requires_grad=True)
    >>> SummedOperator(HessianOperator(lambda: (w**2).sum(), [w]), lambda part: 2 * part).matvec(torch.ones(1))
    tensor([4.])
    """

    _share: LossOperator

    def __init__(self, share: LossOperator, all_reduce: AllReduce) -> None:
        super().__init__(share, all_reduce)

    @cached_property
    def loss(self) -> Tensor:  # type: ignore[override]
        """L, a scalar, detached."""
        return self._all_reduce(self._share.loss)

    @cached_property
    def gradient(self) -> Tensor:
        """∂L/∂w, [n], detached."""
        return self._all_reduce(self._share.gradient)

    def mixed_product(self, v: Tensor, hyperparameters: Sequence[Tensor]) -> list[Tensor | None]:
        """Returns (∂²L/∂w∂λᵀ)ᵀ v, exactly as the shares do."""
        return summed(self._share.mixed_product(v, hyperparameters), hyperparameters, self._all_reduce)


def summed(parts: Sequence[Tensor | None], like: Sequence[Tensor], all_reduce: AllReduce) -> list[Tensor | None]:
    """Returns sums over processes, by one collective; `None`, which stands for zeros, where all of them have `None`.

    Args:
        parts: Tensors shaped like `like`.
        like: One for each.
        all_reduce: Sums over the processes.
    """
    filled = [torch.zeros_like(other) if part is None else part for part, other in zip(parts, like, strict=True)]
    known = torch.tensor([part is not None for part in parts]).to(filled[0])
    flat = all_reduce(torch.cat([known, *(part.detach().reshape(-1) for part in filled)]))
    counts, *sums = torch.split(flat, [len(parts), *(part.numel() for part in filled)])
    pairs = zip(counts.tolist(), sums, like, strict=True)
    return [total.view_as(other).to(other.dtype) if count else None for count, total, other in pairs]
