"""The outer product of the gradient with itself: curvature at the cost of one gradient."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_ifthpo.core.loss import Loss, LossFunction, as_loss
from lightning_ifthpo.curvature.base import InvertibleOperator, LossOperator


class GradientOuterProductOperator(LossOperator, InvertibleOperator):
    """A = g gᵀ with g = ∂L/∂w, which Lorraine, Vicol and Duvenaud (2019) call Gauss–Newton.

    A has rank one and vanishes at a minimum of the loss, where a linear solve inverts the damping alone. Its only
    advantage is the cost: no product and no inverse evaluates the loss again.

    Cost: one forward pass and one differentiable gradient when made.

    Args:
        loss: Callable without arguments that returns the scalar loss, or (loss, outputs); or a `Loss`.
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

    def __init__(self, loss: LossFunction | Loss, parameters: Sequence[Tensor]) -> None:
        super().__init__(as_loss(loss, parameters))
        self._graph = self._loss.graph()

    def _own_product(self, v: Tensor) -> Tensor:
        return self._own_gradient() * (self.gradient @ v)

    def solve(self, b: Tensor, delta: float | Tensor) -> Tensor:
        """Returns (g gᵀ + diag(δ))⁻¹ b; where δ has zeros, the shortest least-squares solution."""
        g, delta = self.gradient, torch.as_tensor(delta, dtype=b.dtype, device=b.device).expand(self.size)
        damped = delta > 0.0
        inverse = torch.where(damped, 1.0 / delta, 0.0)
        undamped = torch.where(damped, 0.0, g)
        length = torch.linalg.vector_norm(undamped)
        if float(length) == 0.0:  # s = gᵀx by the formula of Sherman and Morrison (1950)
            s = (g * inverse) @ b / (1.0 + (g * inverse) @ g)
            x: Tensor = inverse * (b - g * s)
        else:  # the undamped weights move along their part of g alone, and their row gives s
            unit = undamped / length
            s = unit @ b / length
            x = inverse * (b - g * s)
            x = x + unit * ((s - g @ x) / length)
        return x
