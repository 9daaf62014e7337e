"""A loss on one batch: the object that curvature, hypergradients and learning rates are computed from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TypeAlias

import torch
from torch import Tensor

from lightning_ifthpo.core.autodiff import vjp
from lightning_ifthpo.core.graph import LossGraph
from lightning_ifthpo.core.marking import recording_outputs
from lightning_ifthpo.core.random_state import RandomState
from lightning_ifthpo.core.space import ParameterSpace

LossValue: TypeAlias = Tensor | tuple[Tensor, Tensor | Sequence[Tensor]]
"""What a loss function returns: the loss, or (loss, outputs of the model)."""

LossFunction: TypeAlias = Callable[[], LossValue]

AllReduce: TypeAlias = Callable[[Tensor], Tensor]
"""Returns the sum of a tensor over all processes, the same to the last bit in each of them."""


class Loss:
    """L(λ, w) on one batch, in one process or as one process's share of a sum.

    Every evaluation draws the same random numbers. The first one advances the generators, as a call of the function
    does, unless `fix_random_numbers` was called before; later ones leave the generators unchanged.

    Args:
        function: Callable without arguments that returns the scalar loss, or (loss, outputs).
        parameters: The tensors w, together [n].
        name: Used in error messages.
        share: This process's part of the global batch. The function returns the mean over its own examples, so that
            the sum of share · L over all processes is the mean over all examples.
        all_reduce: Sums a tensor over the processes, such as `sum_over_processes`; None for a single process.
        scale: Factor by which the loss is multiplied before it is differentiated, a power of two, which keeps small
            gradients above zero in float16. `combine` divides by it.
        session: Makes a context manager inside which the loss must be evaluated and differentiated.

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

    def __init__(
        self,
        function: LossFunction,
        parameters: Sequence[Tensor],
        *,
        name: str = "the loss",
        share: float = 1.0,
        all_reduce: AllReduce | None = None,
        scale: float = 1.0,
        session: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        self.function = function
        self.space = ParameterSpace(parameters)
        self.name = name
        self.share = share
        self.all_reduce = all_reduce
        self.scale = scale
        self.session = session
        self._random_state: RandomState | None = None

    @property
    def parameters(self) -> list[Tensor]:
        """The tensors w."""
        return self.space.tensors

    def over(self, parameters: Sequence[Tensor]) -> Loss:
        """Returns the same loss as a function of other parameters."""
        return self._copy(parameters, self.all_reduce)

    def own_share(self) -> Loss:
        """Returns this process's share as a loss of a single process."""
        return self._copy(self.parameters, None)

    def fix_random_numbers(self) -> None:
        """Lets all evaluations draw the numbers that come next, and leave the generators unchanged."""
        if self._random_state is None:
            self._random_state = RandomState(self.space.device)

    def evaluate(self) -> tuple[Tensor, Sequence[Tensor]]:
        """Returns this process's scaled share of the loss with its graph, and the outputs that it returned or marked.

        Raises:
            TypeError: If the function does not return a real floating-point tensor.
            ValueError: If it is not a scalar, or depends on no tensor that requires a gradient.
        """
        with self._same_random_numbers(), recording_outputs() as marked:
            returned = self.function()
        value, outputs = returned if isinstance(returned, tuple) else (returned, ())
        _check_value(value, self.name)
        for factor in (self.share, self.scale):
            value = value if factor == 1.0 else value * factor
        return value, [outputs] if isinstance(outputs, Tensor) else outputs or marked

    def value(self) -> Tensor:
        """Returns the whole loss, a detached scalar; one forward pass."""
        return self.combine(self.evaluate()[0])

    def gradient(self) -> Tensor:
        """Returns ∂L/∂w of the whole loss, [n], detached; one gradient."""
        return self.combine(self.space.flatten(vjp([self.evaluate()[0]], self.parameters)))

    def graph(self) -> LossGraph:
        """Returns this process's scaled share with its graph; one forward pass."""
        return LossGraph(self.evaluate()[0], self.space)

    @contextmanager
    def along(self, direction: Sequence[Tensor | None]) -> Iterator[Callable[[float], Tensor]]:
        """Gives a function that moves w to w + α · direction and evaluates this process's scaled share there.

        Take derivatives before the next call, because activation checkpointing computes the forward pass again at the
        weights of that moment. After the block w is restored bit for bit, and the generators are unchanged.

        Args:
            direction: Shaped like the parameters; `None` for zeros.

        Cost: a copy of the parameters.
        """
        self.fix_random_numbers()
        with self.space.restored() as originals:

            @torch.no_grad()
            def move(alpha: float) -> None:
                for tensor, original, part in zip(self.parameters, originals, direction, strict=True):
                    if alpha and part is not None:
                        torch.add(original, part, alpha=alpha, out=tensor)
                    else:
                        tensor.copy_(original)

            def at(alpha: float) -> Tensor:
                move(alpha)
                return self.evaluate()[0]

            yield at

    def combine(self, part: Tensor) -> Tensor:
        """Returns what this process's part of a quantity that is linear in the loss stands for: sum, without scale.

        Args:
            part: Of any shape, computed from `evaluate`. All processes must combine the same quantities in the same
                order.
        """
        part = part.detach()
        total = part if self.all_reduce is None else self.all_reduce(part)
        return total if self.scale == 1.0 else total / self.scale

    def combine_list(self, parts: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor | None]:
        """Returns the same for several tensors by one collective; `None` stands for zeros, in all processes alike.

        Args:
            parts: Shaped like `like`.
            like: One tensor for each part.
        """
        if self.all_reduce is None and self.scale == 1.0:
            return list(parts)
        filled = [torch.zeros_like(other) if part is None else part for part, other in zip(parts, like, strict=True)]
        known = torch.tensor([part is not None for part in parts]).to(filled[0])
        flat = self.combine(torch.cat([known, *(part.detach().reshape(-1) for part in filled)]))
        counts, *sums = torch.split(flat, [len(parts), *(part.numel() for part in filled)])
        pairs = zip(counts.tolist(), sums, like, strict=True)
        return [total.view_as(other).to(other.dtype) if count else None for count, total, other in pairs]

    def _copy(self, parameters: Sequence[Tensor], all_reduce: AllReduce | None) -> Loss:
        return Loss(
            self.function,
            parameters,
            name=self.name,
            share=self.share,
            all_reduce=all_reduce,
            scale=self.scale,
            session=self.session,
        )

    @contextmanager
    def _same_random_numbers(self) -> Iterator[None]:
        if self._random_state is None:
            self.fix_random_numbers()
            yield
        else:
            with self._random_state.replayed():
                yield


def sum_over_processes(tensor: Tensor) -> Tensor:
    """Returns the sum of a tensor over the default process group of torch.distributed, detached."""
    total = tensor.detach().clone()
    torch.distributed.all_reduce(total)
    return total


def as_loss(loss: LossFunction | Loss, parameters: Sequence[Tensor], name: str = "the loss") -> Loss:
    """Returns a loss function as a `Loss`; one that is a `Loss` already as it is."""
    return loss if isinstance(loss, Loss) else Loss(loss, parameters, name=name)


def _check_value(value: object, name: str) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a scalar tensor, got {type(value).__name__}")
    if value.numel() != 1:
        raise ValueError(f"{name}: expected a scalar, got shape {tuple(value.shape)}; take its mean or sum")
    if not value.is_floating_point():
        raise TypeError(f"{name}: expected a real floating-point tensor, got {value.dtype}")
    if not value.requires_grad:
        raise ValueError(
            f"{name} is detached: it depends on no parameter that requires a gradient. Look for .detach(), .item() or "
            "torch.no_grad() in the function that computes it"
        )
