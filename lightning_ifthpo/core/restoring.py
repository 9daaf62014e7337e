"""The way back for single objects: namespaces, containers and random generators."""

from __future__ import annotations

import argparse
import random
import sys
import types
from collections import deque
from collections.abc import Callable
from functools import lru_cache, partial
from operator import is_
from typing import Any

import numpy as np
import torch
from torch import nn

from lightning_ifthpo.core.rewindable import Rewindable

# Objects of these packages are not looked into, nor those of classes that inherit from them: a Trainer, an optimizer or
# a data set leads to everything else.
_LIBRARIES = {"torch", "lightning", "pytorch_lightning", "lightning_fabric", "numpy", "threading", "logging"}
_OPTIONS = (bool, int, float, str, tuple, type(None), torch.dtype, torch.device, types.BuiltinFunctionType)
# Attributes of a class that are put back
_DATA = frozenset(
    {bool, int, float, str, tuple, type(None), list, dict, set, deque, np.ndarray, torch.Tensor, torch.Generator}
)
_US = __name__.split(".")[0]
_OF_TORCH = frozenset(vars(nn.Module()))
_NAMESPACES = (types.SimpleNamespace, argparse.Namespace)


def hook_dicts(module: nn.Module) -> list[dict[int, Any]]:
    """Returns the dicts of hooks of a module; their names are private to torch."""
    return [value for name, value in vars(module).items() if "_hooks" in name and isinstance(value, dict)]


def is_plain_layer(module: nn.Module) -> bool:
    """Returns whether a module is one of torch's own layers, without hooks and with options alone as attributes."""
    if not type(module).__module__.startswith("torch.nn.modules.") or any(hook_dicts(module)):
        return False
    return all(isinstance(value, _OPTIONS) for name, value in vars(module).items() if name not in _OF_TORCH)


def restore_attributes(attributes: dict[str, Any], before: dict[str, Any]) -> None:
    """Gives a namespace its earlier entries again."""
    if _is_same(attributes, before):
        return
    attributes.update(before)  # an interruption never leaves a module without attributes
    for name in attributes.keys() - before.keys():
        del attributes[name]


def refill(container: Any, contents: Any) -> None:
    """Gives a list, dict, set or deque its earlier contents again."""
    if _is_same(container, contents):
        return
    container.clear()
    (container.extend if isinstance(container, (list, deque)) else container.update)(contents)


def _is_same(container: Any, contents: Any) -> bool:
    """Returns whether a container has the same entries in the same order; most are the empty dicts of hooks."""
    if len(container) != len(contents):
        return False
    if not contents:
        return True
    if isinstance(container, dict) and not all(map(is_, container.values(), contents.values())):
        return False
    return all(map(is_, container, contents))


def generator_restorer(value: Any) -> Callable[[], object] | None:
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


def restore_class(kind: type, before: dict[str, Any]) -> None:
    """Gives a class its earlier data again, and takes away what is new."""
    if _is_same(dict(vars(kind)), before):
        return
    for name, value in before.items():
        if is_data(name, value) and vars(kind).get(name) is not value:
            setattr(kind, name, value)
    for name in [name for name, value in vars(kind).items() if name not in before and is_data(name, value)]:
        delattr(kind, name)


def is_data(name: str, value: object) -> bool:
    """Returns whether an attribute of a class is data, such as a counter or a list, and no method or descriptor."""
    return type(value) in _DATA and not name.startswith("__")


def forget(functions: list[types.FunctionType]) -> None:
    """Takes away the attributes of functions that had none."""
    for function in functions:
        if vars(function):
            vars(function).clear()


@lru_cache(maxsize=1024)
def own_classes(kind: type) -> tuple[type, ...]:
    """Returns the class and its bases that belong to the user."""
    return tuple(base for base in kind.__mro__ if _is_own(base) and base.__module__.split(".")[0] != _US)


@lru_cache(maxsize=1024)
def has_own_attributes(kind: type) -> bool:
    """Returns whether objects of a class are looked into: not those of libraries."""
    if kind in _NAMESPACES:
        return True
    return (
        kind is not Rewindable and _is_own(kind) and not any(is_from_library(base.__module__) for base in kind.__mro__)
    )


def _is_own(kind: type) -> bool:
    name = kind.__module__.split(".")[0]
    return name not in sys.stdlib_module_names and not is_from_library(name)


def is_from_library(module: str | None) -> bool:
    """Returns whether a module belongs to a library whose objects are not looked into."""
    return (module or "").split(".")[0] in _LIBRARIES
