"""The outer product of the gradient with itself: curvature for the price of one gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_ifthpo.core.loss import LossGraph, LossValue, loss_and_outputs
from lightning_ifthpo.curvature.base import InvertibleOperator


class GradientOuterProductOperator(InvertibleOperator):
    """A = g gᵀ with g = ∂L/∂w, what Lorraine, Vicol and Duvenaud (2019) call Gauss–Newton.

    Of rank one, and zero at a minimum of the loss, so that it needs damping; there the damping alone is inverted. Its
    products and its inverse are exact and free, which is all that speaks for it.

    Cost: one forward pass and one differentiable gradient when made, nothing a product.

    Args:
        loss: Callable without arguments that returns the scalar loss, or (loss, outputs).
        parameters: The tensors w, together [n].

    Raises:
        TypeError, ValueError: If the loss is not a scalar tensor with a graph.

    >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> operator = GradientOuterProductOperator(lambda: (w**2).sum() / 2, [w])
    >>> operator.to_dense()
    tensor([[1., 2.],
            [2., 4.]])
    >>> operator.solve(torch.tensor([1.0, 2.0]), 5.0)
    tensor([0.1000, 0.2000])
    """

    def __init__(self, loss: Callable[[], LossValue], parameters: Sequence[Tensor]) -> None:
        total, _ = loss_and_outputs(loss())
        self._graph = LossGraph(total, parameters)
        self.loss = total.detach()
        self.size, self.dtype, self.device = self._graph.space.size, self._graph.space.dtype, self._graph.space.device

    @property
    def gradient(self) -> Tensor:
        """∂L/∂w, [n], detached."""
        return self._graph.gradient

    def _product(self, v: Tensor) -> Tensor:
        return self.gradient * (self.gradient @ v)

    def solve(self, b: Tensor, delta: float | Tensor) -> Tensor:
        """Returns (g gᵀ + diag(δ))⁻¹ b by Sherman and Morrison; for δ = 0 the shortest least-squares solution."""
        g = self.gradient
        if not bool((torch.as_tensor(delta) > 0.0).any()):
            squared = g @ g
            return g * torch.where(squared > 0.0, (g @ b) / squared.square(), 0.0)
        return b / delta - (g / delta) * ((g @ (b / delta)) / (1.0 + g @ (g / delta)))

    def mixed_product(self, v: Tensor, hyperparameters: Sequence[Tensor]) -> list[Tensor | None]:
        """Returns (∂²L/∂w∂λᵀ)ᵀ v, exactly; about two gradients."""
        return self._graph.mixed_product(v, hyperparameters)
