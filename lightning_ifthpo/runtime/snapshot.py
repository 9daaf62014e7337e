"""Putting a module back into the state it was found in, bit for bit."""

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

_TENSORS = ("_parameters", "_buffers", "_modules")


@contextmanager
def restored(module: nn.Module) -> Iterator[None]:
    """Puts back what the block does to a module and its submodules.

    That is: attributes that are rebound; the contents of lists, dicts, sets and deques; tensors that are changed in
    place, parameters, buffers and metric states among them; random generators; train/eval modes and requires_grad.
    Inside the block buffers and metric states are copies, because a graph made there may still need them. What lies
    deeper (a list in a list, an object of one's own, what a hook writes elsewhere) is out of reach.

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
    """Yields functions that put one module back; contents first, and last the attributes that hold them."""
    if isinstance(module, torch.jit.ScriptModule):  # whose attributes live elsewhere
        for tensor in [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
            yield _tensor_restorer(tensor)
        return
    yield _attributes_restorer(module)
    for name, value in vars(module).items():
        if name in _TENSORS:
            yield _contents_restorer(value)
            for tensor in value.values():
                if isinstance(tensor, Tensor):
                    yield _tensor_restorer(tensor)
        elif isinstance(value, Tensor):
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
    if tensor.is_meta or tensor.is_inference() or nn.parameter.is_lazy(tensor):  # nothing there, or never changed
        return lambda: None
    # through .data, which no graph and no version counter sees
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
    """Gives a module copies of its buffers and metric states to work on."""
    if isinstance(module, torch.jit.ScriptModule):
        return
    for name, buffer in list(module.named_buffers(recurse=False)):
        module._buffers[name] = copies.setdefault(id(buffer), buffer.clone())
    if isinstance(module, Metric):
        for name, state in module.metric_state.items():
            vars(module)[name] = state.clone() if isinstance(state, Tensor) else list(state)
