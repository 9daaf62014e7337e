"""Curvature from first-order gradients alone, for losses without a second derivative."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor

from lightning_ifthpo.core.autodiff import vjp
from lightning_ifthpo.core.loss import LossValue, check_loss, loss_and_outputs
from lightning_ifthpo.core.random_state import RandomState
from lightning_ifthpo.core.space import ParameterSpace
from lightning_ifthpo.curvature.base import LossOperator


class FiniteDifferenceOperator(LossOperator):
    """Hv ≈ [∇L(w + εv) − ∇L(w − εv)] / 2ε, with w perturbed in place and restored by copy.

    For kernels without a second derivative (fused attention), compiled graphs and sharded parameters. The loss is
    evaluated anew at each product, always under the random state of the first evaluation, so that dropout draws the
    same mask. ε‖v‖ = cbrt(machine epsilon) · max(1, ‖w‖), which balances truncation and rounding: expect a relative
    error of 1e-4 in float32 and 1e-9 in float64, and none to rely on below float32.

    Cost: two gradients a product, and one extra copy of the parameters.

    Args:
        loss: Callable without arguments that returns the scalar loss, or (loss, outputs).
        parameters: The tensors w, together [n].

    >>> w = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    >>> operator = FiniteDifferenceOperator(lambda: (w[0] * w[1]) ** 2, [w])
    >>> operator.to_dense().round(decimals=6)
    tensor([[8., 8.],
            [8., 2.]], dtype=torch.float64)
    """

    def __init__(self, loss: Callable[[], LossValue], parameters: Sequence[Tensor]) -> None:
        self._function = loss
        self._space = ParameterSpace(parameters)
        self.size, self.dtype, self.device = self._space.size, self._space.dtype, self._space.device
        self._random_state = RandomState(self.device)

    @cached_property
    def loss(self) -> Tensor:  # type: ignore[override]
        """L, a scalar, detached; one forward pass when it is first asked for."""
        return self._evaluate().detach()

    @property
    def gradient(self) -> Tensor:
        """∂L/∂w, [n], detached; one more gradient."""
        return self._space.flatten(vjp([self._evaluate()], self._space.tensors))

    def _product(self, v: Tensor) -> Tensor:
        return self._space.flatten(self._difference(v, self._space.tensors))

    def mixed_product(self, v: Tensor, hyperparameters: Sequence[Tensor]) -> list[Tensor | None]:
        """Returns (∂²L/∂w∂λᵀ)ᵀ v ≈ [∂L/∂λ(w + εv) − ∂L/∂λ(w − εv)] / 2ε; two gradients."""
        return self._difference(v, hyperparameters)

    def slope_and_curvature(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """Returns ∇L·v and vᵀHv, scalars, for v: [n], from the same two gradients; the slope to second order in ε."""
        ahead, behind, scale = self._gradients(v, self._space.tensors)
        first, second = (self._space.flatten(gradients) @ v for gradients in (ahead, behind))
        return (first + second) / 2, (first - second) * scale

    def _difference(self, v: Tensor, inputs: Sequence[Tensor]) -> list[Tensor | None]:
        ahead, behind, scale = self._gradients(v, inputs)
        return [None if a is None or b is None else (a - b) * scale for a, b in zip(ahead, behind, strict=True)]

    def _gradients(self, v: Tensor, inputs: Sequence[Tensor]) -> tuple[list[Tensor | None], list[Tensor | None], float]:
        """Returns ∂L/∂inputs at w + εv and at w − εv, and 1 / 2ε."""
        norm = float(torch.linalg.vector_norm(v))
        if norm == 0.0:
            return [None] * len(inputs), [None] * len(inputs), 0.0
        weights = self._space.values
        length = torch.finfo(self.dtype).eps ** (1 / 3) * max(1.0, float(torch.linalg.vector_norm(weights)))
        step = v * (length / norm)
        with self._space.restored():
            self._space.assign(weights + step)
            ahead = vjp([self._evaluate()], inputs)
            self._space.assign(weights - step)
            behind = vjp([self._evaluate()], inputs)
        return ahead, behind, norm / (2 * length)

    def _evaluate(self) -> Tensor:
        with self._random_state.replayed():
            loss, _ = loss_and_outputs(self._function())
        check_loss(loss, "the loss")
        return loss
