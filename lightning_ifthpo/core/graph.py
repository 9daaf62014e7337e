"""What the graph of a loss shows about its derivatives."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node


class SecondDerivativeError(RuntimeError):
    """torch leaves out second derivatives of a loss, refuses to compute them, or computes them wrongly.

    Attributes:
        cause: The message without advice.
    """

    def __init__(self, cause: str, advice: str = "use curvature='finite_difference'") -> None:
        super().__init__(f"{cause}; {advice}")
        self.cause = cause


def nodes(tensors: Sequence[Tensor | None]) -> Iterator[Node]:
    """Yields each node of the graph of tensors once; `None` has no graph."""
    waiting = [tensor.grad_fn for tensor in tensors if tensor is not None and tensor.grad_fn is not None]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        yield node
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                waiting.append(following)


def leaves(tensors: Sequence[Tensor | None]) -> Iterator[Tensor]:
    """Yields the leaf tensors that tensors were computed from."""
    for node in nodes(tensors):
        if hasattr(node, "variable"):
            yield node.variable


def reaches(tensors: Sequence[Tensor | None], others: Sequence[Tensor]) -> bool:
    """Returns whether tensors were computed from one of the others, which may be leaves or results of operations."""
    own, made = set(map(id, others)), {other.grad_fn for other in others if other.grad_fn is not None}
    return any(node in made or id(getattr(node, "variable", None)) in own for node in nodes(tensors))


def custom_functions(tensors: Sequence[Tensor | None]) -> list[str]:
    """Returns the names of all `torch.autograd.Function`s in the graph of tensors, sorted."""
    found = {node.name() for node in nodes(tensors) if isinstance(node, BackwardCFunction)}
    return sorted(name.removesuffix("Backward") for name in found)


# Operations whose derivative jumps, by the names of their nodes.
_KINKS = re.compile("[Rr]elu|Elu|Threshold|Hard|Max|Min|Abs|Clamp|L1|Median|Sort|Topk|Kth|Round|Sign|Floor|Where")


def is_smooth(tensors: Sequence[Tensor | None]) -> bool:
    """Returns whether the graph of tensors has no operation whose derivative jumps, as that of ReLU does."""
    return not any(_KINKS.search(node.name()) for node in nodes(tensors))


def has_convolutions(tensors: Sequence[Tensor | None]) -> bool:
    """Returns whether there is a convolution in the graph of tensors."""
    return any("Convolution" in node.name() for node in nodes(tensors))


def check_differentiable(gradients: Sequence[Tensor | None], loss: Tensor, name: str) -> None:
    """Raises SecondDerivativeError if a backward pass that can be differentiated only once leads to the gradients.

    torch puts a node there that raises an error, and skips it if only derivatives of certain tensors are asked for.
    """
    if any(node.name() == "torch::autograd::Error" for node in nodes(gradients)):
        functions = ", ".join(custom_functions([loss])) or "a custom function"
        raise SecondDerivativeError(
            f"{name} goes through {functions}, whose backward pass can be differentiated only once, and torch would "
            "leave out its second derivative"
        )


# torch and torchvision use several wordings: "derivative for … is not implemented", "double backwards on … not
# supported", "trying to differentiate twice a function that was marked with @once_differentiable"
_REFUSALS = re.compile("derivative .* not implemented|double.?backward|differentiate twice", re.IGNORECASE)


@contextmanager
def second_derivatives_of(name: str) -> Iterator[None]:
    """Raises SecondDerivativeError, with what to do, where torch refuses a second derivative inside the block."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, SecondDerivativeError) or not _REFUSALS.search(str(error)):
            raise
        raise SecondDerivativeError(f"{name} has no second derivative ({str(error).splitlines()[0]})") from error
