"""The exact Hessian, by double backward through one kept graph."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lightning_ifthpo.core.loss import Loss, LossFunction, as_loss
from lightning_ifthpo.curvature.base import LossOperator


class HessianOperator(LossOperator):
    """H = ∂²L/∂w∂wᵀ of a loss that is evaluated once. Away from a minimum, as in most of training, H is indefinite.

    Cost: one forward pass, one differentiable gradient at the first product (memory of two graphs), and about two
    gradients for each product.

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
        self._graph = self._loss.graph()

    def _own_product(self, v: Tensor) -> Tensor:
        return self._graph.hessian_product(v)
