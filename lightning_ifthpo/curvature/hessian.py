"""The exact Hessian, by double backward through one kept graph."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lightning_ifthpo.core.loss import Loss, LossFunction, as_loss
from lightning_ifthpo.curvature.base import GraphOperator


class HessianOperator(GraphOperator):
    """H = ∂²L/∂w∂wᵀ of a loss that is evaluated once.

    H is indefinite away from a minimum, which is the normal case in training.

    Cost: one forward pass, and one differentiable gradient at the first product (memory of two graphs); then about two
    gradients a product.

    Args:
        loss: Callable without arguments that returns the scalar loss, or (loss, outputs); or a `Loss`.
        parameters: The tensors w, together [n].

    Raises:
        TypeError, ValueError: If the loss is not a scalar tensor with a graph.

    >>> import torch
    >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> HessianOperator(lambda: (w[0] * w[1]) ** 2, [w]).to_dense()
    tensor([[8., 8.],
            [8., 2.]])
    """

    def __init__(self, loss: LossFunction | Loss, parameters: Sequence[Tensor]) -> None:
        super().__init__(as_loss(loss, parameters))

    def _own_product(self, v: Tensor) -> Tensor:
        return self._graph.hessian_product(v)
