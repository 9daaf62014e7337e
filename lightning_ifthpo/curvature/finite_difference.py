"""Curvature from gradients alone, for losses without a second derivative."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_ifthpo.core.autodiff import vjp
from lightning_ifthpo.core.loss import Loss, LossFunction, as_loss
from lightning_ifthpo.curvature.base import LossOperator


class FiniteDifferenceOperator(LossOperator):
    """Hv ≈ [∇L(w + εv) − ∇L(w − εv)] / 2ε, with w moved in place and restored from a copy.

    It serves kernels without a second derivative (fused attention), compiled graphs and sharded parameters. Every
    product evaluates the loss again with the same random numbers, so that dropout draws the same mask. The step length
    ε‖v‖ = cbrt(machine epsilon) · max(1, ‖w‖) balances truncation and rounding. Expect a relative error of 1e-4 in
    float32 and 1e-9 in float64; below float32 the result is not reliable.

    Cost: two gradients for a product, and one extra copy of the parameters.

    Args:
        loss: Callable without arguments that returns the scalar loss, or (loss, outputs); or a `Loss`.
        parameters: The tensors w, together [n].

    >>> w = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    >>> operator = FiniteDifferenceOperator(lambda: (w[0] * w[1]) ** 2, [w])
    >>> operator.to_dense().round(decimals=6)
    tensor([[8., 8.],
            [8., 2.]], dtype=torch.float64)
    """

    def __init__(self, loss: LossFunction | Loss, parameters: Sequence[Tensor]) -> None:
        super().__init__(as_loss(loss, parameters))
        self._loss.fix_random_numbers()

    def slope_and_curvature(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """Returns ∇L·v, with an error of O(ε²), and vᵀHv, scalars, for v: [n]; the cost of one product."""
        space = self._loss.space
        ahead, behind, inverse_width = self._gradients(v, space.tensors)
        first, second = (self._loss.combine(space.flatten(gradients) @ v) for gradients in (ahead, behind))
        return (first + second) / 2, (first - second) * inverse_width

    def _own_loss(self) -> Tensor:
        return self._loss.evaluate()[0]

    def _own_gradient(self) -> Tensor:
        return self._loss.space.flatten(vjp([self._loss.evaluate()[0]], self._loss.parameters))

    def _own_product(self, v: Tensor) -> Tensor:
        space = self._loss.space
        return space.flatten(self._own_mixed_product(v, space.tensors))

    def _own_mixed_product(self, v: Tensor, hyperparameters: Sequence[Tensor]) -> list[Tensor | None]:
        ahead, behind, inverse_width = self._gradients(v, hyperparameters)
        pairs = zip(ahead, behind, strict=True)
        return [None if a is None or b is None else (a - b) * inverse_width for a, b in pairs]

    def _gradients(self, v: Tensor, inputs: Sequence[Tensor]) -> tuple[list[Tensor | None], list[Tensor | None], float]:
        """Returns ∂L/∂inputs at w + εv and at w − εv, and 1 / 2ε."""
        norm = float(torch.linalg.vector_norm(v))
        if norm == 0.0:
            return [None] * len(inputs), [None] * len(inputs), 0.0
        space = self._loss.space
        length = torch.finfo(self.dtype).eps ** (1 / 3) * max(1.0, float(torch.linalg.vector_norm(space.values)))
        with self._loss.along(space.split(v * (length / norm))) as at:
            ahead, behind = (vjp([at(sign)], inputs) for sign in (1.0, -1.0))
        return ahead, behind, norm / (2 * length)
