"""Derivatives that also work for unused and frozen tensors, and for tensors that enter a loss linearly."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.grad_mode import _unsafe_preserve_version_counter

from lightning_ifthpo.core.functions import twice_differentiable_functions


def vjp(
    outputs: Sequence[Tensor | None],
    inputs: Sequence[Tensor],
    cotangents: Sequence[Tensor | None] | None = None,
    *,
    create_graph: bool = False,
) -> list[Tensor | None]:
    """Returns cotangentᵀ ∂outputs/∂inputs, one tensor for each input; `None` if no graph connects it to an output.

    Each cotangent has the shape of its output; `None` stands for 1. Outputs that are `None` or constant, and inputs
    that do not require a gradient, count as zero blocks, where `torch.autograd.grad` would raise. The graph is kept for
    further products.
    """
    cotangents = [None] * len(outputs) if cotangents is None else cotangents
    pairs = [(y, u) for y, u in zip(outputs, cotangents, strict=True) if y is not None and y.requires_grad]
    variables = [tensor for tensor in inputs if tensor.requires_grad]
    if not pairs or not variables:
        return [None] * len(inputs)
    ys, us = zip(*pairs, strict=True)
    with twice_differentiable_functions(), without_hooks(variables):
        gradients = torch.autograd.grad(
            ys, variables, us, retain_graph=True, create_graph=create_graph, allow_unused=True
        )
    remaining = iter(gradients)
    return [next(remaining) if tensor.requires_grad else None for tensor in inputs]


@contextmanager
def without_hooks(tensors: Iterable[Any]) -> Iterator[None]:
    """Removes hooks on gradients of tensors or modules inside the block: they would act on products too.

    The attributes are private, because torch has no public list of hooks.
    """
    names = ("_backward_hooks", "_backward_pre_hooks", "_post_accumulate_grad_hooks")
    found = [hooks for tensor in tensors for name in names if (hooks := getattr(tensor, name, None))]
    copies = [hooks.copy() for hooks in found]
    for hooks in found:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, copy in zip(found, copies, strict=True):
            hooks.update(copy)


@contextmanager
def tangents(tensors: Sequence[Tensor], directions: Sequence[Tensor]) -> Iterator[None]:
    """Turns on forward mode: results computed from the tensors in the block carry derivatives along the directions.

    The tensors themselves become dual numbers, because a loss without arguments cannot be given copies. Their values
    do not change, and graphs that have kept them stay valid. Each direction has the shape of its tensor.
    """
    _load_forward_mode()
    with forward_ad.dual_level():
        for tensor, direction in zip(tensors, directions, strict=True):
            # Private: nothing public tells autograd that a tensor was written to and has the same values.
            with torch.no_grad(), _unsafe_preserve_version_counter(tensor):
                tensor.copy_(forward_ad.make_dual(tensor.detach(), direction))  # type: ignore[no-untyped-call]
        yield


@cache
def _load_forward_mode() -> None:
    """Lets torch compile what forward mode needs; it does so on first use, with `torch.jit.script`, which warns."""
    with warnings.catch_warnings(), forward_ad.dual_level():
        warnings.filterwarnings("ignore", "`torch.jit.script`")
        forward_ad.make_dual(torch.zeros(()), torch.zeros(()))  # type: ignore[no-untyped-call]


def tangent(tensor: Tensor) -> Tensor:
    """Returns the derivative that a tensor carries in a block of `tangents`; zeros if it carries none."""
    carried: Tensor | None = forward_ad.unpack_dual(tensor).tangent  # type: ignore[no-untyped-call]
    return torch.zeros_like(tensor) if carried is None else carried


@contextmanager
def gradients_on() -> Iterator[None]:
    """Records graphs in the block, even inside `torch.no_grad` or `torch.inference_mode`."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


@contextmanager
def differentiable(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Records graphs in the block, and lets the leaf tensors require gradients there."""
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


def zeros_for_none(tensors: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor]:
    """Returns the tensors, with zeros shaped like the second list in place of `None`."""
    return [torch.zeros_like(b) if a is None else a for a, b in zip(tensors, like, strict=True)]
