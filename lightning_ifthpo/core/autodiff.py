"""Derivatives that survive what real modules do: unused, frozen and linearly entering tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd import forward_ad


def vjp(
    outputs: Sequence[Tensor | None],
    inputs: Sequence[Tensor],
    cotangents: Sequence[Tensor | None] | None = None,
    *,
    create_graph: bool = False,
) -> list[Tensor | None]:
    """Returns cotangentᵀ ∂outputs/∂inputs, one tensor for each input, `None` where it is zero by structure.

    Outputs that are `None` or constant and inputs without gradient count as zero blocks; `torch.autograd.grad` raises
    on them. The graph is kept, so that many products can be taken.

    Args:
        outputs: Tensors of any shape.
        inputs: Tensors of any shape.
        cotangents: One for each output, of its shape; ones for a scalar output where not given.
        create_graph: Make the result differentiable.
    """
    cotangents = [None] * len(outputs) if cotangents is None else cotangents
    live = [
        (output, cotangent)
        for output, cotangent in zip(outputs, cotangents, strict=True)
        if output is not None and output.requires_grad
    ]
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    if not live or not wanted:
        return [None] * len(inputs)
    gradients = iter(
        torch.autograd.grad(
            [output for output, _ in live],
            wanted,
            [cotangent for _, cotangent in live],
            retain_graph=True,
            create_graph=create_graph,
            allow_unused=True,
        )
    )
    return [next(gradients) if tensor.requires_grad else None for tensor in inputs]


@contextmanager
def tangents(tensors: Sequence[Tensor], directions: Sequence[Tensor]) -> Iterator[None]:
    """Makes all that is computed from the tensors inside the block carry its derivative along the directions.

    Forward mode, for losses that refer to the tensors themselves and cannot be given others; see `tangent`.

    Args:
        tensors: Tensors of any shape; their values stay as they are.
        directions: One for each, of its shape.
    """
    with forward_ad.dual_level():
        with torch.no_grad():
            for tensor, direction in zip(tensors, directions, strict=True):
                tensor.copy_(forward_ad.make_dual(tensor.detach().clone(), direction))  # type: ignore[no-untyped-call]
        yield


def tangent(tensor: Tensor) -> Tensor:
    """Returns the derivative that a tensor carries inside a block of `tangents`, zeros where it carries none."""
    carried: Tensor | None = forward_ad.unpack_dual(tensor).tangent  # type: ignore[no-untyped-call]
    return torch.zeros_like(tensor) if carried is None else carried


@contextmanager
def gradients_on() -> Iterator[None]:
    """Records graphs inside the block, wherever it stands."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


@contextmanager
def differentiable(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Turns on gradients (modes and flags) for leaf tensors inside the block, and restores the flags after it."""
    frozen = [tensor for tensor in tensors if not tensor.requires_grad]
    try:
        for tensor in frozen:
            tensor.requires_grad_(True)
        with gradients_on():
            yield
    finally:
        for tensor in frozen:
            tensor.requires_grad_(False)


def add(left: Sequence[Tensor | None], right: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Returns the sums of two lists of tensors in which `None` stands for zero."""
    return [b if a is None else a if b is None else a + b for a, b in zip(left, right, strict=True)]
