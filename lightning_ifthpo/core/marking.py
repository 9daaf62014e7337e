"""Marking the outputs of a model inside a loss, for Gauss–Newton curvature and KFAC."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

_recorder: ContextVar[list[Tensor] | None] = ContextVar("_recorder", default=None)


def mark_outputs(output: Tensor) -> Tensor:
    """Returns the output unchanged, and records that the model ends here while a `Loss` is evaluated.

    Call it on every tensor through which the data term of the loss depends on the parameters, usually the logits, and
    compute the loss from the tensors that it returns.

    Args:
        output: Floating-point tensor of any shape.

    Raises:
        TypeError: If the output is no tensor, such as a tuple of several.

    >>> import torch
    >>> from lightning_ifthpo.curvature import GaussNewtonOperator
    >>> w, x, y = torch.tensor([2.0], requires_grad=True), torch.tensor([1.0, 3.0]), torch.tensor([1.0, 2.0])
    >>> GaussNewtonOperator(lambda: (mark_outputs(w * x) - y).square().sum(), [w]).to_dense()  # 2 x·x
    tensor([[20.]])
    """
    if not isinstance(output, Tensor):
        raise TypeError(
            f"mark_outputs expected a tensor, got {type(output).__name__}; of several outputs call it on each: "
            "a, b = mark_outputs(a), mark_outputs(b)"
        )
    recorder = _recorder.get()
    if recorder is not None:
        recorder.append(output)
    return output


@contextmanager
def recording_outputs() -> Iterator[list[Tensor]]:
    """Collects the tensors that `mark_outputs` is called with inside the block."""
    outputs: list[Tensor] = []
    token = _recorder.set(outputs)
    try:
        yield outputs
    finally:
        _recorder.reset(token)
