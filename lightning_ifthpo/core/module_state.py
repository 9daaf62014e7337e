"""The state of modules: evaluating a loss leaves it as it was, and every evaluation starts from the same."""

from __future__ import annotations

import array
import copyreg
import io
import types
from collections import deque
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_ifthpo.core.copies import TensorState, has_state, lazy_copy
from lightning_ifthpo.core.restoring import (
    forget,
    generator_restorer,
    has_own_attributes,
    hook_dicts,
    is_data,
    is_from_library,
    is_plain_layer,
    own_classes,
    refill,
    restore_attributes,
    restore_class,
)
from lightning_ifthpo.core.rewindable import Rewindable

# Entries of a list, dict, set or deque. Longer ones hold data: nothing inside them is looked into, and the longest are
# left alone, because comparing a million entries takes longer than a small evaluation.
_LONG, _LONGEST = 256, 100_000
_LARGE_ARRAY = 2**24  # bytes; larger NumPy arrays hold data, and are left alone


class ModuleState:
    """The state of a module and its submodules when the object is made.

    It holds attributes, also train/eval modes; the contents of lists, dicts, sets and deques, also nested ones; those
    of objects of the user's own classes; data of these classes, and what their methods keep in defaults and attributes;
    what hooks have kept; tensors, with `requires_grad` and `.grad`; random generators; and the position of iterators.
    It does not hold files, global variables, or the inside of objects from libraries.

    Args:
        module: The module.
        complete: Also hold the contents of weights, which `rewind` does not need, and what hooks have kept.

    Cost: a walk over all attributes. A tensor is copied when something writes to it, or at once if it is a weight or
    small.
    """

    def __init__(self, module: nn.Module, *, complete: bool = True) -> None:
        self._complete = complete
        self._hooks: list[Callable[[], object]] = []
        self._seen: set[int] = set()
        self._rewindables: dict[int, Rewindable] = {}
        self._bare: list[types.FunctionType] = []  # methods without attributes
        # run in reverse: contents first, attributes last
        self._restorers: list[Callable[[], object]] = [partial(forget, self._bare)]
        self._tensors: list[TensorState] = []
        self._exchanged: list[tuple[MutableMapping[str, Any], str, Tensor | Rewindable]] = []
        self._flags: list[bool] = []
        self._bound: list[tuple[MutableMapping[str, Any], str, Any, Any]] = []
        self._add(module)
        exchanged = {id(value) for _, _, value in self._exchanged}
        for state in self._tensors:
            state.is_exchanged = id(state.tensor) in exchanged

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Starts the block from this state, on copies that stay bound until the next evaluation or `restore`."""
        self.rewind()
        self.exchange()
        try:
            yield
        finally:
            self.restore_flags()

    def exchange(self) -> None:
        """Binds copies in place of buffers and other tensors that no derivative is taken of: a graph may keep them."""
        self._flags = [state.tensor.requires_grad for state in self._tensors]
        copies: dict[int, Any] = {}  # a buffer may be shared
        for namespace, name, value in self._exchanged:
            if id(value) not in copies:
                if isinstance(value, Rewindable):
                    copies[id(value)] = value.ahead()
                else:
                    copies[id(value)] = value if value.requires_grad else lazy_copy(value)
            self._bound.append((namespace, name, namespace[name], copies[id(value)]))
            namespace[name] = copies[id(value)]

    def restore_flags(self) -> None:
        """Restores `requires_grad` as it was before the evaluation: hyperparameters require gradients for a while."""
        for state, flag in zip(self._tensors, self._flags, strict=True):
            if state.tensor.requires_grad is not flag and state.tensor.is_leaf:
                state.tensor.requires_grad_(flag)

    def rewind(self) -> None:
        """Returns to the state between two evaluations: tensors that require a gradient stay as they are."""
        self._restore_objects()
        for state in self._tensors:
            state.rewind()

    def restore(self) -> None:
        """Returns to the state, bit for bit."""
        self._restore_objects()
        for restore in self._hooks:
            restore()
        for state in self._tensors:
            state.restore()

    def _restore_objects(self) -> None:
        while self._bound:
            namespace, name, value, copy = self._bound.pop()
            # a list is refilled below
            if isinstance(namespace, dict) and namespace.get(name) is copy:
                namespace[name] = value
        for restore in reversed(self._restorers):
            restore()
        for namespace, name, value in self._exchanged:
            if isinstance(value, Rewindable):
                namespace[name] = value if value.read_ahead else value.source

    def _add(self, value: Any) -> None:
        if id(value) in self._seen or isinstance(value, (str, bytes, int, float, type(None))):
            return
        self._seen.add(id(value))
        if isinstance(value, nn.Module):
            self._add_module(value)
        elif isinstance(value, Tensor):
            if has_state(value):
                self._tensors.append(TensorState(value, keeps_weights=self._complete))
        elif isinstance(value, (list, dict, set, deque)):
            self._add_container(value)
        elif isinstance(value, tuple):
            self._add_all(value)
        elif isinstance(value, np.ndarray):
            if value.nbytes <= _LARGE_ARRAY and value.flags.writeable:
                self._restorers.append(partial(np.copyto, value, value.copy()))
        elif isinstance(value, (bytearray, array.array)):
            self._restorers.append(partial(value.__setitem__, slice(None), value[:]))
        elif isinstance(value, partial):
            self._add_all([value.func, value.args, value.keywords])
        elif isinstance(value, types.FunctionType):
            if not is_from_library(value.__module__):
                self._add_function(value)
        elif isinstance(value, types.MethodType):
            self._add(value.__self__)
        elif (restore := generator_restorer(value)) is not None:
            self._restorers.append(restore)
        elif has_own_attributes(value.__class__):
            self._add_slots(value)
            if hasattr(value, "__dict__"):
                self._add_attributes(vars(value))
            self._add_classes(type(value))

    def _add_container(self, container: Any) -> None:
        if len(container) <= _LONGEST:
            self._restorers.append(partial(refill, container, container.copy()))
        if len(container) <= _LONG:
            if isinstance(container, (list, dict)):
                for place, value in list(container.items() if isinstance(container, dict) else enumerate(container)):
                    self._add_iterator(container, place, value)
            self._add_all(container)

    def _add_slots(self, value: Any) -> None:
        for name in copyreg._slotnames(type(value)):  # type: ignore[attr-defined]
            if hasattr(value, name):
                self._restorers.append(partial(setattr, value, name, getattr(value, name)))
                self._add(getattr(value, name))

    def _add_iterator(self, namespace: Any, name: Any, value: Any) -> bool:
        """Lets evaluations read ahead of an iterator; returns whether the value is one of Python's own or of torch."""
        if not isinstance(value, Iterator) or isinstance(value, io.IOBase) or has_own_attributes(type(value)):
            return False
        source = value if isinstance(value, Rewindable) else self._rewindables.setdefault(id(value), Rewindable(value))
        self._exchanged.append((namespace, name, source))
        return True

    def _add_all(self, values: Any) -> None:
        if len(values) <= _LONG:
            for value in list(values.values() if isinstance(values, dict) else values):
                self._add(value)

    def _add_module(self, module: nn.Module) -> None:
        parameters = module._parameters.values()
        for tensor in [*parameters, *module.buffers(recurse=False)]:
            self._add(tensor)
        for child in module.children():
            self._add(child)
        # inside torch.func.functional_call, which puts its parameters and buffers back by itself
        exchanged = any(not isinstance(parameter, nn.Parameter | None) for parameter in parameters)
        if not exchanged and is_plain_layer(module):
            self._add_layer(module)
            return
        if isinstance(module, torch.jit.ScriptModule):  # its attributes live in C++
            return
        for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
            self._exchange(module._buffers, name, buffer)
        if exchanged:
            self._seen |= {id(module._parameters), id(module._buffers)}
        for hooks in hook_dicts(module):
            # restored at the end only, because a library may hook layers for a few evaluations
            self._hooks.append(partial(refill, hooks, hooks.copy()))
            self._seen.add(id(hooks))
            if self._complete:
                self._add_all(hooks)
        self._add_attributes(vars(module))
        self._add_classes(type(module))

    def _add_layer(self, layer: nn.Module) -> None:
        """Adds one of torch's own layers, whose attributes are options that no forward pass changes, without hooks."""
        attributes = vars(layer)
        self._restorers.append(partial(restore_attributes, attributes, attributes.copy()))
        for name in ("_parameters", "_buffers", "_modules"):
            self._restorers.append(partial(refill, attributes[name], attributes[name].copy()))
        for hooks in hook_dicts(layer):
            self._hooks.append(hooks.clear)
        for name, buffer in layer.named_buffers(recurse=False, remove_duplicate=False):
            self._exchange(layer._buffers, name, buffer)

    def _add_attributes(self, attributes: dict[str, Any]) -> None:
        self._restorers.append(partial(restore_attributes, attributes, attributes.copy()))
        for name, value in attributes.items():
            if not self._add_iterator(attributes, name, value):
                self._add(value)
                if isinstance(value, Tensor):
                    self._exchange(attributes, name, value)

    def _add_function(self, function: types.FunctionType) -> None:
        """Adds what a function of the user keeps: in variables around it, in defaults and in attributes."""
        self._add_defaults(function)
        for cell in function.__closure__ or ():
            if cell != types.CellType():  # an empty cell has no contents yet
                self._restorers.append(partial(setattr, cell, "cell_contents", cell.cell_contents))
                self._add(cell.cell_contents)

    def _add_defaults(self, function: types.FunctionType) -> None:
        self._add_all([function.__defaults__, function.__kwdefaults__])
        self._add_attributes(vars(function))

    def _add_classes(self, kind: type) -> None:
        """Adds what the user's own classes keep: data, and what their methods keep in defaults and attributes.

        Variables around a method count as global ones.
        """
        for base in own_classes(kind):
            if id(base) not in self._seen:
                self._seen.add(id(base))
                before = dict(vars(base))
                self._restorers.append(partial(restore_class, base, before))
                for name, value in before.items():
                    value = getattr(value, "__func__", value)  # of static methods and class methods
                    if is_data(name, value):
                        self._add(value)
                    elif isinstance(value, types.FunctionType):
                        if value.__defaults__ or value.__kwdefaults__ or vars(value):
                            self._add_defaults(value)
                        else:
                            self._bare.append(value)

    def _exchange(self, namespace: MutableMapping[str, Any], name: str, tensor: Tensor) -> None:
        if has_state(tensor):
            self._exchanged.append((namespace, name, tensor))
