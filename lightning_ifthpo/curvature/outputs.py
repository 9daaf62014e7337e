"""The outputs of a model as the place where curvature of the loss and of the model are taken apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import cast

import torch
from torch import Tensor

from lightning_ifthpo.core.autodiff import vjp


def checked_outputs(outputs: Sequence[Tensor]) -> Sequence[Tensor]:
    """Returns the outputs of a model that a loss marked or returned, after checking them.

    Raises:
        ValueError: If there is none, one depends on no parameter, or one depends on another.
    """
    if not outputs:
        raise ValueError(
            "this curvature needs the model's outputs: call mark_outputs(logits) inside the loss, or return "
            "(loss, outputs) from it"
        )
    for output in outputs:
        if output.grad_fn is None:
            raise ValueError("a marked output does not depend on any parameter; mark what the model returns")
    for index, output in enumerate(outputs):
        later = outputs[index + 1 :]
        if vjp(later, [output], [torch.zeros_like(other) for other in later]) != [None]:
            raise ValueError("a marked output depends on another one; mark only the last on each way to the loss")
    return outputs


@contextmanager
def cut_at(outputs: Sequence[Tensor]) -> Iterator[None]:
    """Stops gradients behind the outputs inside the block; the outputs themselves still receive theirs."""
    with ExitStack() as stack:
        for output in outputs:
            assert output.grad_fn is not None, "only the result of an operation can be cut"
            stack.callback(output.grad_fn.register_prehook(_dropping(output.output_nr)).remove)
        yield


def _dropping(index: int) -> Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]]:
    """Returns a backward pre-hook that drops the gradient of one output of its node, and so stops backpropagation."""

    def drop(gradients: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        # torch takes None for "no gradient" here, which its annotation does not say
        return cast("tuple[Tensor, ...]", tuple(None if i == index else g for i, g in enumerate(gradients)))

    return drop
