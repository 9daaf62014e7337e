"""Derivatives that also work for unused and frozen tensors, and for tensors that enter a loss linearly."""

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
    """Returns cotangentᵀ ∂outputs/∂inputs, one tensor for each input; `None` if no graph connects it to an output.

    Outputs that are `None` or constant, and inputs that do not require a gradient, count as zero blocks;
    `torch.autograd.grad` would raise on them. The graph is kept for further products.

    Args:
        outputs: Tensors of any shape.
        inputs: Tensors of any shape.
        cotangents: One for each output, of its shape; None stands for 1, for a scalar output.
        create_graph: Make the result differentiable.
    """
    cotangents = [None] * len(outputs) if cotangents is None else cotangents
    live = [
        (output, cotangent)
        for output, cotangent in zip(outputs, cotangents, strict=True)
        if output is not None and output.requires_grad
    ]
    differentiable_inputs = [tensor for tensor in inputs if tensor.requires_grad]
    if not live or not differentiable_inputs:
        return [None] * len(inputs)
    gradients = iter(
        torch.autograd.grad(
            [output for output, _ in live],
            differentiable_inputs,
            [cotangent for _, cotangent in live],
            retain_graph=True,
            create_graph=create_graph,
            allow_unused=True,
        )
    )
    return [next(gradients) if tensor.requires_grad else None for tensor in inputs]


@contextmanager
def tangents(tensors: Sequence[Tensor], directions: Sequence[Tensor]) -> Iterator[None]:
    """Turns on forward mode: results computed from the tensors in the block carry derivatives along the directions.

    For losses that use the tensors themselves, so that no copies can be passed; `tangent` reads the derivatives.

    Args:
        tensors: Tensors of any shape; their values do not change.
        directions: One for each, of its shape.
    """
    with forward_ad.dual_level():
        with torch.no_grad():
            for tensor, direction in zip(tensors, directions, strict=True):
                tensor.copy_(forward_ad.make_dual(tensor.detach().clone(), direction))  # type: ignore[no-untyped-call]
        yield


def tangent(tensor: Tensor) -> Tensor:
    """Returns the derivative that a tensor carries in a block of `tangents`, zeros if it carries none."""
    carried: Tensor | None = forward_ad.unpack_dual(tensor).tangent  # type: ignore[no-untyped-call]
    return torch.zeros_like(tensor) if carried is None else carried


@contextmanager
def gradients_on() -> Iterator[None]:
    """Records graphs in the block, even inside `torch.no_grad` or `torch.inference_mode`."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


@contextmanager
def differentiable(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Records graphs in the block and makes the leaf tensors require gradients; restores their flags after it."""
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
    """Returns the elementwise sum of two lists of tensors; `None` stands for zero."""
    return [b if a is None else a if b is None else a + b for a, b in zip(left, right, strict=True)]
