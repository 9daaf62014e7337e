"""Curvature over more examples than fit into one batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from lightning_ifthpo.core.random_state import RandomState
from lightning_ifthpo.curvature.base import CurvatureOperator


class AverageOperator(CurvatureOperator):
    """Σ wᵢAᵢ / Σ wᵢ. With wᵢ the size of batch i this is the curvature of the mean loss over all examples.

    Every product makes each operator again and then discards it, so that only one is in memory. Dropout draws the same
    masks every time, from the random state at construction. A single operator is made once.

    Args:
        operators: Callables without arguments that return Aᵢ, all on vectors [n].
        weights: wᵢ, positive.

    Raises:
        ValueError: If there is no operator, a weight is missing, or one is not positive.

    >>> import torch
    >>> from lightning_ifthpo.curvature import MatrixOperator
    >>> one, two = MatrixOperator(torch.eye(1)), MatrixOperator(2 * torch.eye(1))
    >>> AverageOperator([lambda: one, lambda: two], weights=[1, 3]).matvec(torch.ones(1))
    tensor([1.7500])
    """

    def __init__(self, operators: Sequence[Callable[[], CurvatureOperator]], weights: Sequence[float]) -> None:
        if not operators or len(operators) != len(weights) or min(weights) <= 0:
            raise ValueError(f"expected a positive weight for each of {len(operators)} operators, got {weights}")
        first = operators[0]()
        self.size, self.dtype, self.device = first.size, first.dtype, first.device
        self._operators = [lambda: first] if len(operators) == 1 else operators
        self._weights = [weight / sum(weights) for weight in weights]
        self._random_state = RandomState(self.device)

    def _product(self, v: Tensor) -> Tensor:
        total = v.new_zeros(self.size)
        with self._random_state.replayed():
            for make, weight in zip(self._operators, self._weights, strict=True):
                total += weight * make().matvec(v)
        return total
