"""Functions of torch that spoil second derivatives, and what takes their place while a loss is differentiated."""

from __future__ import annotations

import importlib
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointFunction, checkpoint
from torch.utils.hooks import RemovableHandle

_MODULES: Any = importlib.import_module("torch.nn.modules.module")
_OLD_WEIGHT_NORM: Any = importlib.import_module("torch.nn.utils.weight_norm")  # a function hides the module


_TRUE_REGISTER_HOOK: Any = Tensor.register_hook
_keeps_hooks: ContextVar[bool] = ContextVar("_keeps_hooks", default=False)


@contextmanager
def keeping_hooks() -> Iterator[None]:
    """Lets tensors take hooks inside the block all the same, for libraries that read gradients by them."""
    token = _keeps_hooks.set(True)
    try:
        yield
    finally:
        _keeps_hooks.reset(token)


@contextmanager
def twice_differentiable_functions() -> Iterator[None]:
    """Replaces functions of torch inside the block.

    - A re-entrant checkpoint hides the weights inside it from `torch.autograd.grad`. It becomes a non-reentrant one.
    - The second derivative of the fused `_weight_norm` is wrong (in torch 2.6 and 2.14), and on CUDA its norm has the
      precision of float32, also in float64. It becomes several operations.
    - Hooks on gradients, which a forward pass registers, would act on products too. They are left out.

    Enter it for derivatives too, because checkpoints repeat the forward pass then.
    """
    before = [(owner, name, vars(owner).get(name)) for owner, name, _ in _REPLACEMENTS]
    for owner, name, replacement in _REPLACEMENTS:
        setattr(owner, name, replacement)
    try:
        yield
    finally:
        for owner, name, function in before:
            if function is None:  # inherited
                delattr(owner, name)
            else:
                setattr(owner, name, function)


def _checkpoint(function: Any, preserve_rng_state: bool, *args: Any) -> Any:
    if any(isinstance(arg, Tensor) and arg.requires_grad for arg in args):
        return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=preserve_rng_state)
    with torch.no_grad():  # a re-entrant checkpoint gives no gradient then
        return function(*args)


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    return v * (g / torch.norm_except_dim(v, 2, dim))


def _register_hook(tensor: Tensor, hook: Any) -> RemovableHandle:
    return _TRUE_REGISTER_HOOK(tensor, hook) if _keeps_hooks.get() else RemovableHandle(OrderedDict())


class _NoBackwardHook:
    """Takes the place of the object that lets a layer's hooks act on its gradients."""

    def __init__(self, *_: Any) -> None:
        pass

    def setup_input_hook(self, args: Any) -> Any:
        return args

    def setup_output_hook(self, args: Any) -> Any:
        return args


_REPLACEMENTS: list[tuple[Any, str, Any]] = [
    (CheckpointFunction, "apply", _checkpoint),
    (torch, "_weight_norm", _weight_norm),
    (_OLD_WEIGHT_NORM, "_weight_norm", _weight_norm),
    (Tensor, "register_hook", _register_hook),
    (_MODULES, "BackwardHook", _NoBackwardHook),
]
