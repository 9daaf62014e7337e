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
        output: Floating-point tensor with one dimension at least.

    Raises:
        TypeError: If the output is no tensor, such as a tuple of several.
        ValueError: If it is a scalar. That is a loss, in which Gauss–Newton curvature is zero.

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
    if output.ndim == 0:
        raise ValueError(
            "mark_outputs expected what the model returns, such as logits [B, C], got a scalar, as a loss is; mark the "
            "tensor from which the loss is computed, and reshape(1) an output that is a single number"
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
