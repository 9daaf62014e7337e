"""One loss on one batch with its graph kept: gradient, Hessian products and mixed products from one forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TypeAlias

from torch import Tensor

from lightning_ifthpo.core.autodiff import vjp
from lightning_ifthpo.core.space import ParameterSpace

LossValue: TypeAlias = Tensor | tuple[Tensor, Tensor | Sequence[Tensor]]
"""What a loss function returns: the loss, or (loss, outputs of the model)."""


class LossGraph:
    """A scalar loss L(λ, w), evaluated once, that can be differentiated twice with respect to w.

    Keeping the graph freezes dropout masks and batch statistics, so that all products belong to one linear map.
    Parameters that are frozen, unused or enter linearly have zero blocks.

    Args:
        loss: Scalar tensor with its graph.
        parameters: The tensors w, together [n].

    Raises:
        TypeError: If the loss is not a tensor.
        ValueError: If the loss is not scalar, or does not require a gradient.

    >>> import torch
    >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> graph = LossGraph((w**3).sum(), [w])
    >>> graph.gradient
    tensor([ 3., 12.])
    >>> graph.hessian_product(torch.tensor([1.0, 1.0]))
    tensor([ 6., 12.])
    """

    def __init__(self, loss: Tensor, parameters: Sequence[Tensor]) -> None:
        check_loss(loss, "the loss")
        self.loss = loss
        self.space = ParameterSpace(parameters)

    @property
    def gradient(self) -> Tensor:
        """∂L/∂w, [n], detached."""
        return self.space.flatten(self.differentiable_gradient)

    @cached_property
    def differentiable_gradient(self) -> list[Tensor | None]:
        """∂L/∂w, shaped like the parameters, with its graph (about the cost of one more gradient, paid once)."""
        return vjp([self.loss], self.space.tensors, create_graph=True)

    def hessian_product(self, v: Tensor) -> Tensor:
        """Returns H v, [n], with H = ∂²L/∂w∂wᵀ and v: [n]; about two gradients (Pearlmutter 1994)."""
        return self.space.flatten(vjp(self.differentiable_gradient, self.space.tensors, self.space.split(v)))

    def mixed_product(self, v: Tensor, hyperparameters: Sequence[Tensor]) -> list[Tensor | None]:
        """Returns (∂²L/∂w∂λᵀ)ᵀ v for v: [n], shaped like the hyperparameters, `None` where it is zero by structure."""
        return vjp(self.differentiable_gradient, hyperparameters, self.space.split(v))


def loss_and_outputs(value: LossValue) -> tuple[Tensor, Sequence[Tensor]]:
    """Returns the loss and the outputs that came with it, if any."""
    loss, outputs = value if isinstance(value, tuple) else (value, ())
    return loss, [outputs] if isinstance(outputs, Tensor) else outputs


def check_loss(loss: object, name: str) -> None:
    """Raises TypeError or ValueError unless the loss is a real scalar tensor that carries a graph."""
    if not isinstance(loss, Tensor):
        raise TypeError(f"{name}: expected a scalar tensor, got {type(loss).__name__}")
    if loss.numel() != 1:
        raise ValueError(f"{name}: expected a scalar, got shape {tuple(loss.shape)}; take its mean or sum")
    if not loss.is_floating_point():
        raise TypeError(f"{name}: expected a real floating-point tensor, got {loss.dtype}")
    if not loss.requires_grad:
        raise ValueError(
            f"{name} is detached: it depends on no parameter that requires a gradient. Look for .detach(), .item() or "
            "torch.no_grad() in the function that computes it"
        )
