"""The outputs of a model, which separate the curvature of the loss from the curvature of the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor

from lightning_ifthpo.core.autodiff import vjp


def checked_outputs(outputs: Sequence[Tensor]) -> Sequence[Tensor]:
    """Returns the model's outputs that a loss marked or returned, after checking them.

    Raises:
        ValueError: If there is none, one depends on no parameter, or one depends on another.
    """
    if not outputs:
        raise ValueError(
            "this curvature needs the model's outputs: call mark_outputs(logits) inside the loss, or return "
            "(loss, outputs) from it"
        )
    for index, output in enumerate(outputs):
        if output.grad_fn is None:
            raise ValueError("a marked output does not depend on any parameter; mark what the model returns")
        later = outputs[index + 1 :]
        if vjp(later, [output], [torch.zeros_like(other) for other in later]) != [None]:
            raise ValueError("a marked output depends on another one; mark only the last on each way to the loss")
    return outputs


@contextmanager
def cut_at(outputs: Sequence[Tensor]) -> Iterator[None]:
    """Stops backpropagation at the outputs inside the block; the outputs themselves still get their gradients."""
    with ExitStack() as stack:
        for output in outputs:
            assert output.grad_fn is not None, "only the result of an operation can be cut"
            stack.callback(output.grad_fn.register_prehook(partial(_drop, output.output_nr)).remove)
        yield


def _drop(index: int, gradients: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    return tuple(None if i == index else gradient for i, gradient in enumerate(gradients))
