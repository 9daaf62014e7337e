"""Marking the outputs of a model inside a loss, which is what Gauss–Newton needs to know."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import cast

import torch
from torch import Tensor

from lightning_ifthpo.core.autodiff import vjp

_recorder: ContextVar[list[Tensor] | None] = ContextVar("_recorder", default=None)


def mark_outputs(output: Tensor) -> Tensor:
    """Returns the output unchanged, and tells a Gauss–Newton operator that is looking that the model ends here.

    Outside of curvature computations it does nothing. Call it on every tensor through which the data term of the loss
    depends on the parameters, usually the logits, and go on with those very tensors.

    Args:
        output: Floating-point tensor of any shape.
    """
    recorder = _recorder.get()
    if recorder is not None:
        recorder.append(output)
    return output


@contextmanager
def recording_outputs() -> Iterator[list[Tensor]]:
    """Collects what `mark_outputs` is called with inside the block."""
    outputs: list[Tensor] = []
    token = _recorder.set(outputs)
    try:
        yield outputs
    finally:
        _recorder.reset(token)


def known_outputs(outputs: Sequence[Tensor]) -> Sequence[Tensor]:
    """Returns the outputs of a model, by `mark_outputs` or beside the loss, once they are checked.

    Raises:
        ValueError: If there are none, one of them depends on nothing, or one of them on another.
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
    """Lets no gradient pass through the outputs inside the block, although they still receive their own."""
    with ExitStack() as stack:
        for output in outputs:
            assert output.grad_fn is not None, "only the result of an operation can be cut"
            stack.callback(output.grad_fn.register_prehook(_dropping(output.output_nr)).remove)
        yield


def _dropping(index: int) -> Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]]:
    """Returns a backward pre-hook that drops the gradient of one output of its node, which prunes all behind it."""

    def drop(gradients: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        # torch takes None for "no gradient" here, which its annotation does not say
        return cast("tuple[Tensor, ...]", tuple(None if i == index else g for i, g in enumerate(gradients)))

    return drop
