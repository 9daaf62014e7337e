"""The state of modules: evaluating a loss leaves it as it was, and every evaluation starts from the same."""

from __future__ import annotations

import argparse
import io
import random
import sys
import types
import warnings
from collections import deque
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from lightning_ifthpo.core.copies import TensorState, has_state, lazy_copy
from lightning_ifthpo.core.rewindable import Rewindable

# Objects of these packages are not looked into, nor those of classes that inherit from them: a Trainer, an optimizer or
# a data set leads to everything else.
_LIBRARIES = {"torch", "lightning", "pytorch_lightning", "lightning_fabric", "numpy", "threading", "logging"}
_NAMESPACES = (types.SimpleNamespace, argparse.Namespace)
_LONG = 10_000  # entries; a longer list is copied as a whole, but nothing inside it

_inside_restored: ContextVar[bool] = ContextVar("_inside_restored", default=False)


class ModuleState:
    """The state of a module and its submodules when the object is made.

    It holds attributes, also train/eval modes; the contents of lists, dicts, sets and deques, also nested ones; those
    of objects of the user's own classes, and what hooks have kept; tensors, with `requires_grad` and `.grad`; random
    generators; and the position of iterators. It does not hold files, global variables, or the inside of objects from
    libraries.

    Args:
        module: The module.
        hooks: Include what hooks have kept.

    Cost: a walk over all attributes. A tensor is copied when something writes to it, or at once if it is a weight or
    small.
    """

    def __init__(self, module: nn.Module, *, hooks: bool = True) -> None:
        self.modules = frozenset(map(id, module.modules()))
        self._looks_into_hooks = hooks
        self._hooks: list[Callable[[], object]] = []
        self._seen: set[int] = set()
        self._restorers: list[Callable[[], object]] = []  # run in reverse: contents first, attributes last
        self._tensors: list[TensorState] = []
        self._exchanged: list[tuple[MutableMapping[str, Any], str, Tensor | Rewindable]] = []
        self._flags: list[bool] = []
        self._bound: list[tuple[MutableMapping[str, Any], str, Any, Any]] = []
        self._add(module)

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
            if not state.tensor.requires_grad:
                state.restore_visibly()
            state.restore_grad()

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
            if namespace.get(name) is copy:
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
                self._tensors.append(TensorState(value))
        elif isinstance(value, (list, dict, set, deque)):
            self._restorers.append(partial(_refill, value, value.copy()))
            self._add_all(value)
        elif isinstance(value, tuple):
            self._add_all(value)
        elif isinstance(value, types.FunctionType):
            self._add_closure(value)
        elif isinstance(value, types.MethodType):
            self._add(value.__self__)
        elif (restore := _generator_restorer(value)) is not None:
            self._restorers.append(restore)
        elif _has_own_attributes(value.__class__):
            self._add_attributes(vars(value))

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
        if isinstance(module, torch.jit.ScriptModule):  # its attributes live in C++
            return
        for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
            self._exchange(module._buffers, name, buffer)
        # inside torch.func.functional_call, which puts its parameters and buffers back by itself
        if any(not isinstance(parameter, nn.Parameter | None) for parameter in parameters):
            self._seen |= {id(module._parameters), id(module._buffers)}
        for name, hooks in vars(module).items():
            if name.startswith("_") and "hooks" in name and isinstance(hooks, dict):
                # restored at the end only, because a library may hook layers for a few evaluations
                self._hooks.append(partial(_refill, hooks, hooks.copy()))
                self._seen.add(id(hooks))
                if self._looks_into_hooks:
                    self._add_all(hooks)
        self._add_attributes(vars(module))

    def _add_attributes(self, attributes: dict[str, Any]) -> None:
        self._restorers.append(partial(_restore_attributes, attributes, attributes.copy()))
        for name, value in attributes.items():
            if isinstance(value, Iterator) and not isinstance(value, io.IOBase):
                source = value if isinstance(value, Rewindable) else Rewindable(value)
                self._exchanged.append((attributes, name, source))
            else:
                self._add(value)
                if isinstance(value, Tensor):
                    self._exchange(attributes, name, value)

    def _add_closure(self, function: types.FunctionType) -> None:
        if function.__closure__ and not _is_from_library(function.__module__):
            for cell in function.__closure__:
                if cell != types.CellType():  # an empty cell has no contents yet
                    self._restorers.append(partial(setattr, cell, "cell_contents", cell.cell_contents))
                    self._add(cell.cell_contents)

    def _exchange(self, namespace: MutableMapping[str, Any], name: str, tensor: Tensor) -> None:
        if has_state(tensor):
            self._exchanged.append((namespace, name, tensor))


@contextmanager
def restored(module: nn.Module) -> Iterator[ModuleState]:
    """Undoes, after the block, what it does to a module and its submodules, bit for bit; see `ModuleState`."""
    state = ModuleState(module)
    token = _inside_restored.set(True)
    try:
        yield state
    finally:
        state.restore()
        _inside_restored.reset(token)


@contextmanager
def modules_rewound() -> Iterator[None]:
    """Undoes, after the block, what it does to modules whose forward pass it calls; weights stay as they are.

    What hooks have kept stays, so that they can be used to look on. Inside a block of `restored` nothing is undone
    here, because that block knows the modules and may keep their copies for longer.
    """
    if _inside_restored.get():
        yield
        return
    states: list[ModuleState] = []
    known: set[int] = set()

    def remember(module: nn.Module, _: Any) -> None:
        if id(module) not in known:
            states.append(ModuleState(module, hooks=False))
            known.update(states[-1].modules)
            states[-1].exchange()

    handle = register_module_forward_pre_hook(remember)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Using `torch.compile.module.` when there are global hooks")
            yield
    finally:
        handle.remove()
        for state in reversed(states):
            state.restore_flags()
            state.rewind()


def _restore_attributes(attributes: dict[str, Any], before: dict[str, Any]) -> None:
    attributes.update(before)  # an interruption never leaves a module without attributes
    for name in attributes.keys() - before.keys():
        del attributes[name]


def _refill(container: Any, contents: Any) -> None:
    if container or contents:  # most are the empty dicts of hooks
        container.clear()
        (container.extend if isinstance(container, (list, deque)) else container.update)(contents)


def _generator_restorer(value: Any) -> Callable[[], object] | None:
    """Returns the function that restores a random generator; None for other objects."""
    if isinstance(value, torch.Generator):
        return partial(value.set_state, value.get_state())
    if isinstance(value, random.Random):
        return partial(value.setstate, value.getstate())
    if isinstance(value, np.random.Generator):
        return partial(setattr, value.bit_generator, "state", value.bit_generator.state)
    if isinstance(value, np.random.RandomState):
        return partial(value.set_state, value.get_state())
    return None


@lru_cache(maxsize=1024)
def _has_own_attributes(kind: type) -> bool:
    """Returns whether objects of a class are looked into: not those of libraries."""
    if kind in _NAMESPACES:
        return True
    own = kind.__module__.split(".")[0] not in sys.stdlib_module_names
    return own and kind.__dictoffset__ != 0 and not any(_is_from_library(base.__module__) for base in kind.__mro__)


def _is_from_library(module: str | None) -> bool:
    return (module or "").split(".")[0] in _LIBRARIES
