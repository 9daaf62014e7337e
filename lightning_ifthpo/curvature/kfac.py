"""Kronecker-factored curvature, by curvlinops."""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ifthpo.curvature.operator import InvertibleOperator
from lightning_ifthpo.loss_graph import LossGraph, LossValue, loss_and_outputs


class KFACOperator(InvertibleOperator):
    """A block for each linear or convolutional layer, the Kronecker product of two covariances (Martens, Grosse 2015).

    One is that of the layer's inputs, the other that of gradients at its outputs, with the exact Hessian of the loss in
    the outputs. Its inverse is exact and cheap; itself it is exact for a single linear layer with squared error, and
    knows nothing of how layers act on each other, nor of penalties on weights. Needs `pip install
    lightning_ifthpo[kfac]`, which brings curvlinops.

    To be handed to `implicit_hypergradient` as `curvature=partial(KFACOperator, model=..., ...)`, with solver
    `Direct(damping=...)`.

    Cost: one forward and C backward passes for C outputs when made; a product and an inverse cost as much as a pass.

    Args:
        loss: L_T, a callable without arguments that returns the scalar loss, or (loss, outputs): for its gradient and
            its mixed derivatives, which are exact.
        parameters: The tensors w, together [n]: weights and biases of Linear and Conv2d layers.
        model: The network that holds them; it is called with the inputs.
        loss_function: nn.CrossEntropyLoss, nn.MSELoss or nn.BCEWithLogitsLoss, with its reduction.
        data: Batches of (inputs, targets).

    Raises:
        ImportError: If curvlinops is not installed.
        ValueError: If a parameter is shared between layers or belongs to another kind of layer.
    """

    def __init__(
        self,
        loss: Callable[[], LossValue],
        parameters: Sequence[Tensor],
        *,
        model: nn.Module,
        loss_function: nn.Module,
        data: Iterable[tuple[Tensor, Tensor]],
    ) -> None:
        try:
            self._library: Any = importlib.import_module("curvlinops")
        except ImportError as error:
            raise ImportError("KFACOperator needs curvlinops: pip install 'lightning_ifthpo[kfac]'") from error
        _check_layers(model, parameters)
        total, _ = loss_and_outputs(loss())
        self._graph = LossGraph(total, parameters)
        self.loss = total.detach()
        self.size, self.dtype, self.device = self._graph.space.size, self._graph.space.dtype, self._graph.space.device
        self._kfac = self._library.KFACLinearOperator(
            model,
            loss_function,
            list(parameters),
            list(data),
            fisher_type="type-2",
            check_deterministic=False,
            separate_weight_and_bias=False,
        )
        self._product(torch.zeros(self.size, dtype=self.dtype, device=self.device))  # computes the factors, now

    @property
    def gradient(self) -> Tensor:
        """∂L/∂w, [n], detached."""
        return self._graph.gradient

    def _product(self, v: Tensor) -> Tensor:
        product: Tensor = self._kfac @ v
        return product

    def solve(self, b: Tensor, delta: float | Tensor) -> Tensor:
        """Returns (A + δI)⁻¹ b, exactly, by eigendecompositions of the factors.

        Raises:
            ValueError: If δ is not one positive number.
        """
        if torch.as_tensor(delta).numel() != 1 or not float(delta) > 0.0:
            raise ValueError(f"the inverse of KFAC needs damping by one number > 0, got {delta}")
        inverse = self._library.KFACInverseLinearOperator(self._kfac, damping=float(delta), use_exact_damping=True)
        solution: Tensor = inverse @ b
        return solution

    def mixed_product(self, v: Tensor, hyperparameters: Sequence[Tensor]) -> list[Tensor | None]:
        """Returns (∂²L/∂w∂λᵀ)ᵀ v, exactly; about two gradients."""
        return self._graph.mixed_product(v, hyperparameters)


def _check_layers(model: nn.Module, parameters: Sequence[Tensor]) -> None:
    uses: Counter[int] = Counter()
    supported: set[int] = set()
    for module in model.modules():
        own = [parameter for parameter in vars(module)["_parameters"].values() if parameter is not None]
        uses.update(map(id, own))
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            supported.update(map(id, own))
    for index, parameter in enumerate(parameters):
        shape = tuple(parameter.shape)
        if uses[id(parameter)] > 1:
            raise ValueError(
                f"parameter {index}, of shape {shape}, is shared between layers, which KFAC cannot express"
            )
        if id(parameter) not in supported:
            raise ValueError(
                f"parameter {index}, of shape {shape}, belongs to no Linear or Conv2d layer of the model, and KFAC "
                "knows no other"
            )
