"""Restores a module to its earlier state, bit for bit."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics import Metric


@contextmanager
def restored(module: nn.Module) -> Iterator[None]:
    """Undoes, after the block, its changes to a module and its submodules, bit for bit.

    It restores attributes, also train/eval modes; the contents of lists, dicts, sets and deques; tensors, with their
    requires_grad; and random generators. Inside the block buffers and metric states are copies, because a graph
    recorded there may still need them. It does not restore deeper state: a list in a list, an object of the user's own
    class, or anything that a hook writes elsewhere.

    Cost: a copy of all tensors of the module.
    """
    copies: dict[int, Tensor] = {}  # a buffer may be shared
    with ExitStack() as stack:
        for submodule in module.modules():
            for restore in _restorers(submodule):
                stack.callback(restore)
        for submodule in module.modules():
            _exchange_state(submodule, copies)
        yield


def _restorers(module: nn.Module) -> Iterator[Callable[[], object]]:
    """Yields functions that restore one module. They run in reverse order: contents first, the attributes last."""
    attributes = {} if isinstance(module, torch.jit.ScriptModule) else vars(module)  # a ScriptModule's live in C++
    yield partial(_restore_attributes, attributes, attributes.copy())
    for tensor in [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
        yield _tensor_restorer(tensor)
    for value in attributes.values():
        if isinstance(value, Tensor):
            yield _tensor_restorer(value)
        elif isinstance(value, (list, dict, set, deque)):
            yield partial(_refill, value, value.copy())
        elif isinstance(value, torch.Generator):
            yield partial(value.set_state, value.get_state())
        elif isinstance(value, random.Random):
            yield partial(value.setstate, value.getstate())
        elif isinstance(value, np.random.Generator):
            yield partial(setattr, value.bit_generator, "state", value.bit_generator.state)


def _restore_attributes(attributes: dict[str, Any], before: dict[str, Any]) -> None:
    attributes.update(before)  # an interruption never leaves a module without attributes
    for name in attributes.keys() - before.keys():
        del attributes[name]


def _refill(container: Any, contents: Any) -> None:
    container.clear()
    (container.extend if isinstance(container, (list, deque)) else container.update)(contents)


def _tensor_restorer(tensor: Tensor) -> Callable[[], object]:
    if tensor.is_meta or tensor.is_inference() or nn.parameter.is_lazy(tensor):  # no storage, or read-only
        return lambda: None
    # .data bypasses autograd: the graph and the version counter do not see the copy
    storage, values, flag = tensor.data, tensor.data.clone(), tensor.requires_grad

    def restore() -> None:
        storage.copy_(values)
        tensor.data = storage
        if tensor.is_leaf:
            tensor.requires_grad_(flag)

    return restore


def _exchange_state(module: nn.Module, copies: dict[int, Tensor]) -> None:
    """Replaces a module's buffers and metric states by copies."""
    if isinstance(module, torch.jit.ScriptModule):
        return
    for name, buffer in list(module.named_buffers(recurse=False)):
        setattr(module, name, copies.setdefault(id(buffer), buffer.clone()))
    if isinstance(module, Metric):
        for name, state in module.metric_state.items():
            vars(module)[name] = state.clone() if isinstance(state, Tensor) else list(state)
