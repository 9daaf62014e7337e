"""Curvature that is spread over processes."""

from __future__ import annotations

from torch import Tensor

from lightning_ifthpo.core.loss import AllReduce
from lightning_ifthpo.curvature.base import CurvatureOperator


class DistributedOperator(CurvatureOperator):
    """Σ wᵣAᵣ, with one operator Aᵣ in each process.

    All processes must ask for the same products in the same order. Cost: one collective for each product.

    Args:
        own: Aᵣ, the operator of this process.
        weight: wᵣ.
        all_reduce: Sums a tensor over the processes.

    >>> import torch
    >>> from lightning_ifthpo.curvature import MatrixOperator
    >>> DistributedOperator(MatrixOperator(torch.eye(1)), 0.5, all_reduce=lambda part: 4 * part).matvec(torch.ones(1))
    tensor([2.])
    """

    def __init__(self, own: CurvatureOperator, weight: float, all_reduce: AllReduce) -> None:
        self._own = own
        self._weight = weight
        self._all_reduce = all_reduce
        self.size, self.dtype, self.device = own.size, own.dtype, own.device

    def _product(self, v: Tensor) -> Tensor:
        return self._all_reduce(self._weight * self._own.matvec(v))
