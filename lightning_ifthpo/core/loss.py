"""A loss on one batch: the object that curvature, hypergradients and learning rates are computed from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import KW_ONLY, dataclass, replace
from functools import cached_property
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lightning_ifthpo.core.autodiff import vjp, zeros_for_none
from lightning_ifthpo.core.functions import twice_differentiable_functions
from lightning_ifthpo.core.graph import check_differentiable
from lightning_ifthpo.core.marking import recording_outputs
from lightning_ifthpo.core.random_state import RandomState, isolated
from lightning_ifthpo.core.side_effects import modules_rewound
from lightning_ifthpo.core.space import ParameterSpace

LossFunction: TypeAlias = Callable[[], Tensor | tuple[Tensor, Tensor | Sequence[Tensor]]]
"""Returns the scalar loss, or (loss, outputs of the model)."""

AllReduce: TypeAlias = Callable[[Tensor], Tensor]
"""Returns the sum of a tensor over all processes, the same to the last bit in each of them."""


class NoLossError(TypeError):
    """There is no loss on this batch: a training step returned None, and training skips the batch."""


@dataclass(eq=False, repr=False)
class Loss:
    """L(λ, w) on one batch, in one process or as one process's share of a sum.

    Every evaluation draws the same random numbers and finds modules in the same state. The first one advances the
    generators, as a call of the function does, unless `fix_random_numbers` was called before. Later ones leave the
    generators unchanged. All of them undo what they change in modules: buffers, counters, queues, gradients.

    Args:
        function: Callable without arguments that returns the scalar loss, or (loss, outputs).
        parameters: The tensors w, together [n].
        name: Used in error messages.
        share: This process's part of the global batch. The function returns the mean over its own examples, so that
            the sum of share · L over all processes is the mean over all examples.
        all_reduce: Sums a tensor over the processes, such as `sum_over_processes`; None for a single process.
        is_verified: Whether its second derivatives are known to be right. If not, the graph is searched for some that
            torch leaves out.
        forward_mode: Whether derivatives of the outputs along a direction are taken in forward mode, by a forward pass
            that carries them, which is cheaper with convolutions. No part may then be computed from the parameters
            inside `torch.no_grad`, where forward mode goes on; use `Tensor.detach`.
        difference_factor: How much shorter than usual the steps of differences are, as an earlier batch has shown.
        scale: A power of two by which the loss is multiplied before it is differentiated, so that small gradients do
            not become zero in float16. `combine` divides by it.

    Raises:
        TypeError, ValueError: See `ParameterSpace`.

    >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> loss = Loss(lambda: (w**2).sum(), [w])
    >>> loss.gradient()
    tensor([2., 4.])
    >>> with loss.along([torch.ones(2)]) as at:
    ...     at(0.5).item(), at(-0.5).item()
    (8.5, 2.5)
    """

    function: LossFunction
    parameters: Sequence[Tensor]
    _: KW_ONLY
    name: str = "the loss"
    share: float = 1.0
    all_reduce: AllReduce | None = None
    scale: float = 1.0
    is_verified: bool = False
    forward_mode: bool = False
    difference_factor: float = 1.0

    def __post_init__(self) -> None:
        self.space = ParameterSpace(self.parameters)
        self.parameters = self.space.tensors
        self._random_state: RandomState | None = None

    def over(self, parameters: Sequence[Tensor]) -> Loss:
        """Returns the same loss, with the same random numbers, as a function of other parameters."""
        return self._changed(parameters=parameters)

    def in_forward_mode(self) -> Loss:
        """Returns the same loss, with the same random numbers, as one that is verified in forward mode."""
        return self._changed(is_verified=True, forward_mode=True)

    def _changed(self, **changes: Any) -> Loss:
        other = replace(self, **changes)
        other._random_state = self._random_state
        return other

    def own_share(self) -> Loss:
        """Returns this process's share as a loss of a single process."""
        return replace(self, all_reduce=None)

    def fix_random_numbers(self) -> RandomState:
        """Lets all evaluations draw the numbers that come next, and leave the generators unchanged."""
        if self._random_state is None:
            self._random_state = RandomState(self.space.device)
        return self._random_state

    def evaluate(self, *, graph: bool = True) -> tuple[Tensor, Sequence[Tensor]]:
        """Returns this process's share · scale · L with its graph, and the outputs that the loss returned or marked.

        Raises:
            TypeError: If the function does not return a real floating-point tensor, or (loss, outputs).
            ValueError: If the loss is not a scalar, or a graph is needed and it depends on nothing that requires one.
        """
        random_numbers = nullcontext() if self._random_state is None else self._random_state.replayed()
        self.fix_random_numbers()
        with random_numbers:
            return self._evaluate(graph)

    def _evaluate(self, graph: bool) -> tuple[Tensor, Sequence[Tensor]]:
        """Returns what `evaluate` does, with the random numbers that come next."""
        with modules_rewound(), twice_differentiable_functions(), recording_outputs() as marked:
            returned = self.function()
        value, outputs = _checked(returned, self.name, graph)
        for factor in (self.share, self.scale):
            value = value if factor == 1.0 else value * factor
        return value, outputs or marked

    def value(self) -> Tensor:
        """Returns the loss on the global batch, a detached scalar; one forward pass."""
        return self.combine(self.evaluate(graph=False)[0])

    def gradient(self) -> Tensor:
        """Returns ∂L/∂w on the global batch, [n], detached; one gradient."""
        return self.combine(self.space.flatten(vjp([self.evaluate()[0]], self.parameters)))

    def graph(self) -> LossGraph:
        """Returns this process's share · scale · L with its graph; one forward pass."""
        return LossGraph(self.evaluate()[0], self)

    @contextmanager
    def along(self, direction: Sequence[Tensor | None], *, graph: bool = True) -> Iterator[Callable[[float], Tensor]]:
        """Gives a function of α that moves w to w + α · direction and returns this process's share · scale · L there.

        The direction is shaped like the parameters, with `None` for zeros. Take derivatives before the next call,
        because activation checkpointing repeats the forward pass at the current weights; without a graph there are
        none to take. After the block w is restored bit for bit, and the generators are as before it; inside, random
        numbers continue those of the last evaluation. Cost: a copy of the parameters.
        """
        random_state = self.fix_random_numbers()
        with isolated(self.space.device), self.space.restored() as originals:

            def at(alpha: float) -> Tensor:
                with torch.no_grad():
                    for tensor, original, part in zip(self.parameters, originals, direction, strict=True):
                        if alpha and part is not None:
                            torch.add(original, part, alpha=alpha, out=tensor)
                        else:
                            tensor.copy_(original)
                random_state.restore()
                return self._evaluate(graph)[0]

            yield at

    def combine(self, part: Tensor) -> Tensor:
        """Returns a quantity on the global batch: the sum of all processes' parts, divided by the scale.

        A part has any shape and is linear in the value of `evaluate`. All processes must combine the same quantities in
        the same order.
        """
        part = part.detach()
        total = part if self.all_reduce is None else self.all_reduce(part)
        return total if self.scale == 1.0 else total / self.scale

    def combine_list(self, parts: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor | None]:
        """Combines several parts by one collective, each shaped like its tensor in the second list.

        `None` stands for zeros, and is returned where all processes pass it.
        """
        if self.all_reduce is None and self.scale == 1.0:
            return list(parts)
        tensors = zeros_for_none(parts, like)
        known = torch.tensor([part is not None for part in parts]).to(tensors[0])
        flat = self.combine(torch.cat([known, *(tensor.reshape(-1) for tensor in tensors)]))
        counts, *sums = torch.split(flat, [len(parts), *(tensor.numel() for tensor in tensors)])
        pairs = zip(counts.tolist(), sums, like, strict=True)
        return [total.view_as(other).to(other.dtype) if count else None for count, total, other in pairs]


@dataclass(eq=False, repr=False)
class LossGraph:
    """A scalar loss L(λ, w) that was evaluated once and can be differentiated twice.

    All products use the same graph, with the same dropout masks and batch statistics. Parameters that are frozen,
    unused or enter linearly have zero blocks.

    Attributes:
        value: L, a scalar tensor with its graph.
        loss: The loss that was evaluated.

    >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> graph = Loss(lambda: (w**3).sum(), [w]).graph()
    >>> graph.gradient
    tensor([ 3., 12.])
    >>> graph.hessian_product(torch.tensor([1.0, 1.0]))
    tensor([ 6., 12.])
    """

    value: Tensor
    loss: Loss

    @property
    def space(self) -> ParameterSpace:
        """The parameters w, together [n]."""
        return self.loss.space

    @property
    def gradient(self) -> Tensor:
        """∂L/∂w, [n], detached."""
        return self.space.flatten(self.differentiable_gradient)

    @cached_property
    def differentiable_gradient(self) -> list[Tensor | None]:
        """∂L/∂w, shaped like the parameters, with its graph; the first access costs about one gradient.

        Raises:
            SecondDerivativeError: If torch would leave out a second derivative.
        """
        gradients = vjp([self.value], self.space.tensors, create_graph=True)
        if not self.loss.is_verified:
            check_differentiable(gradients, self.value, self.loss.name)
        return gradients

    def hessian_product(self, v: Tensor) -> Tensor:
        """Returns H v, [n], with H = ∂²L/∂w∂wᵀ and v: [n]; about two gradients (Pearlmutter 1994)."""
        return self.space.flatten(vjp(self.differentiable_gradient, self.space.tensors, self.space.split(v)))

    def mixed_product(self, v: Tensor, hyperparameters: Sequence[Tensor]) -> list[Tensor | None]:
        """Returns (∂²L/∂w∂λᵀ)ᵀ v for v: [n], shaped like the hyperparameters; `None` where it is zero by structure."""
        return vjp(self.differentiable_gradient, hyperparameters, self.space.split(v))


def sum_over_processes(tensor: Tensor) -> Tensor:
    """Returns the sum of a tensor over the default process group of torch.distributed, detached."""
    total = tensor.detach().clone()
    torch.distributed.all_reduce(total)
    return total


def as_loss(loss: LossFunction | Loss, parameters: Sequence[Tensor], name: str = "the loss") -> Loss:
    """Returns a `Loss` unchanged, and a function as the `Loss` of these parameters.

    Raises:
        ValueError: If a `Loss` has other parameters, or the same ones in another order.
    """
    if not isinstance(loss, Loss):
        return Loss(loss, parameters, name=name)
    if list(map(id, loss.parameters)) != list(map(id, parameters)):
        raise ValueError(f"{loss.name} is a Loss of other parameters; pass loss.parameters, or loss.over(parameters)")
    return loss


def _checked(returned: object, name: str, graph: bool) -> tuple[Tensor, Sequence[Tensor]]:
    """Returns the loss and its outputs, if they are what a loss function may return."""
    if isinstance(returned, tuple) and len(returned) != 2:
        raise TypeError(f"{name}: expected a scalar tensor or (loss, outputs), got a tuple of {len(returned)}")
    value, outputs = returned if isinstance(returned, tuple) else (returned, ())
    outputs = [outputs] if isinstance(outputs, Tensor) else outputs
    if not isinstance(outputs, Sequence) or not all(isinstance(output, Tensor) for output in outputs):
        raise TypeError(f"{name}: expected a scalar tensor or (loss, outputs), got outputs {outputs!r}")
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a scalar tensor, got {type(value).__name__}")
    if value.numel() != 1:
        raise ValueError(f"{name}: expected a scalar, got shape {tuple(value.shape)}; take its mean or sum")
    if not value.is_floating_point():
        raise TypeError(f"{name}: expected a real floating-point tensor, got {value.dtype}")
    if graph and not value.requires_grad:
        raise ValueError(
            f"{name} is detached: it depends on no parameter that requires a gradient. Look for .detach(), .item() or "
            "torch.no_grad() in the function that computes it"
        )
    return value, outputs
