"""Restores a module to its earlier state, bit for bit."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics import Metric


@contextmanager
def restored(module: nn.Module) -> Iterator[None]:
    """Undoes, after the block, what the block changed in a module and its submodules, bit for bit.

    Restored are: attributes; the contents of lists, dicts, sets and deques; the values of tensors (parameters, buffers,
    metric states, others); random generators; train/eval modes and requires_grad. Inside the block buffers and metric
    states are copies, because a graph recorded there may still need them. Deeper state is not restored: a list in a
    list, an object of the user's own class, what a hook writes elsewhere.

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
    """Yields functions that restore one module. They run in reverse: first contents, last the attributes."""
    if not isinstance(module, torch.jit.ScriptModule):  # its attributes live in C++
        yield _attributes_restorer(module)
    for tensor in [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
        yield _tensor_restorer(tensor)
    for value in () if isinstance(module, torch.jit.ScriptModule) else vars(module).values():
        if isinstance(value, Tensor):
            yield _tensor_restorer(value)
        elif isinstance(value, (list, dict, set, deque)):
            yield _contents_restorer(value)
        elif isinstance(value, (torch.Generator, np.random.Generator, random.Random)):
            yield _generator_restorer(value)


def _attributes_restorer(module: nn.Module) -> Callable[[], object]:
    attributes = vars(module).copy()

    def restore() -> None:
        vars(module).update(attributes)
        for name in vars(module).keys() - attributes.keys():
            del vars(module)[name]

    return restore


def _contents_restorer(container: Any) -> Callable[[], object]:
    contents = container.copy()

    def restore() -> None:
        container.clear()
        if isinstance(container, (list, deque)):
            container.extend(contents)
        else:
            container.update(contents)

    return restore


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


def _generator_restorer(generator: torch.Generator | np.random.Generator | random.Random) -> Callable[[], object]:
    if isinstance(generator, torch.Generator):
        state = generator.get_state()
        return lambda: generator.set_state(state)
    if isinstance(generator, np.random.Generator):
        numpy_state = generator.bit_generator.state
        return lambda: setattr(generator.bit_generator, "state", numpy_state)
    python_state = generator.getstate()
    return lambda: generator.setstate(python_state)


def _exchange_state(module: nn.Module, copies: dict[int, Tensor]) -> None:
    """Replaces a module's buffers and metric states by copies."""
    if isinstance(module, torch.jit.ScriptModule):
        return
    for name, buffer in list(module.named_buffers(recurse=False)):
        setattr(module, name, copies.setdefault(id(buffer), buffer.clone()))
    if isinstance(module, Metric):
        for name, state in module.metric_state.items():
            vars(module)[name] = state.clone() if isinstance(state, Tensor) else list(state)
