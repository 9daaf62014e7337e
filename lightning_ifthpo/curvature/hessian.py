"""The exact Hessian, by double backward through one kept graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from lightning_ifthpo.core.loss import LossGraph, LossValue, loss_and_outputs
from lightning_ifthpo.curvature.base import LossOperator


class HessianOperator(LossOperator):
    """H = ∂²L/∂w∂wᵀ of a loss that is evaluated once.

    Cost: one forward pass and one differentiable gradient when made (memory of two graphs), then about two gradients
    a product. H is indefinite away from a minimum: the normal case in training.

    Args:
        loss: Callable without arguments that returns the scalar loss, or (loss, outputs).
        parameters: The tensors w, together [n].

    Raises:
        TypeError, ValueError: If the loss is not a scalar tensor with a graph.

    >>> import torch
    >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> HessianOperator(lambda: (w[0] * w[1]) ** 2, [w]).to_dense()
    tensor([[8., 8.],
            [8., 2.]])
    """

    def __init__(self, loss: Callable[[], LossValue], parameters: Sequence[Tensor]) -> None:
        total, _ = loss_and_outputs(loss())
        self._graph = LossGraph(total, parameters)
        self.loss = self._graph.loss.detach()
        self.size, self.dtype, self.device = self._graph.space.size, self._graph.space.dtype, self._graph.space.device

    @property
    def gradient(self) -> Tensor:
        """∂L/∂w, [n], detached."""
        return self._graph.gradient

    def _product(self, v: Tensor) -> Tensor:
        return self._graph.hessian_product(v)

    def mixed_product(self, v: Tensor, hyperparameters: Sequence[Tensor]) -> list[Tensor | None]:
        """Returns (∂²L/∂w∂λᵀ)ᵀ v, exactly; about one gradient."""
        return self._graph.mixed_product(v, hyperparameters)
