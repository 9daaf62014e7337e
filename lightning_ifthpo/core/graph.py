"""The graph of one evaluation of a loss: gradient, Hessian products and mixed products from one forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from torch import Tensor

from lightning_ifthpo.core.autodiff import vjp
from lightning_ifthpo.core.space import ParameterSpace


class LossGraph:
    """A scalar loss L(λ, w), evaluated once, that can be differentiated twice with respect to w.

    The graph is kept, so that dropout masks and batch statistics are fixed and all products belong to one linear map.
    Parameters that are frozen, unused or enter linearly have zero blocks.

    Args:
        value: The loss, a scalar tensor with its graph.
        space: The parameters w, together [n].

    >>> import torch
    >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> graph = LossGraph((w**3).sum(), ParameterSpace([w]))
    >>> graph.gradient
    tensor([ 3., 12.])
    >>> graph.hessian_product(torch.tensor([1.0, 1.0]))
    tensor([ 6., 12.])
    """

    def __init__(self, value: Tensor, space: ParameterSpace) -> None:
        self.value = value
        self.space = space

    @property
    def gradient(self) -> Tensor:
        """∂L/∂w, [n], detached."""
        return self.space.flatten(self.differentiable_gradient)

    @cached_property
    def differentiable_gradient(self) -> list[Tensor | None]:
        """∂L/∂w, shaped like the parameters, with its graph. The first access costs about one gradient."""
        return vjp([self.value], self.space.tensors, create_graph=True)

    def hessian_product(self, v: Tensor) -> Tensor:
        """Returns H v, [n], with H = ∂²L/∂w∂wᵀ and v: [n]; about two gradients (Pearlmutter 1994)."""
        return self.space.flatten(vjp(self.differentiable_gradient, self.space.tensors, self.space.split(v)))

    def mixed_product(self, v: Tensor, hyperparameters: Sequence[Tensor]) -> list[Tensor | None]:
        """Returns (∂²L/∂w∂λᵀ)ᵀ v for v: [n], shaped like the hyperparameters; `None` where it is zero by structure."""
        return vjp(self.differentiable_gradient, hyperparameters, self.space.split(v))
