"""A Trainer and its data that are as before, after a fit that was only a trial."""

from __future__ import annotations

import copy
import types
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from functools import partial
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_ifthpo.core.random_state import isolated
from lightning_ifthpo.core.restoring import generator_restorer, is_from_library, refill, restore_attributes

# Entries of a list, dict, set or deque. Longer ones hold examples: they are put back, and not looked into. The longest
# are left alone, because comparing millions of entries takes seconds.
_LONG, _LONGEST = 256, 100_000
_LEFT_ALONE = (nn.Module, Tensor, Optimizer, Callback, Logger, Enum, type, types.ModuleType)
_CALLABLE = (types.FunctionType, types.MethodType, types.BuiltinFunctionType, partial)
_LOOKED_INTO = ("lightning.", "pytorch_lightning.", "lightning_fabric.", "torch.utils.data.")


@contextmanager
def rewound(trainer: L.Trainer, *data: Any) -> Iterator[None]:
    """Undoes, after the block, what it does to a Trainer, to data and to the random state, also after an error.

    Of the Trainer these are loops, counters, callbacks, loggers, limits, metrics, the loss scaler and the strategy; of
    data modules, loaders, samplers and data sets, attributes, the contents of lists and dicts, and random generators.
    Processes that the strategy has started go on. It does not undo what has been read from an iterator without a
    length, or written into tensors and files.
    """
    scaler = copy.deepcopy(trainer.precision_plugin.state_dict())
    state = _State()
    state.add(trainer)
    state.add(data)
    with isolated(trainer.strategy.root_device):
        try:
            yield
        finally:
            state.restore()
            trainer.precision_plugin.load_state_dict(scaler)


class _State:
    """What objects of Lightning, data, and what they refer to are like when they are added."""

    def __init__(self) -> None:
        self._seen: dict[int, Any] = {}  # keeps objects alive, so that no other one has the same id
        self._restorers: list[Callable[[], object]] = []

    def add(self, value: Any) -> None:
        pending = [value]
        while pending:
            value = pending.pop()
            if id(value) in self._seen or isinstance(
                value, (str, bytes, int, float, type(None), *_LEFT_ALONE, *_CALLABLE)
            ):
                continue
            self._seen[id(value)] = value
            pending += self._kept(value)

    def _kept(self, value: Any) -> list[Any]:
        """Keeps the state of an object, and returns what it refers to."""
        found: list[Any] = []
        if (restore := generator_restorer(value)) is not None:
            self._restorers.append(restore)
            return found
        if isinstance(value, (list, dict, set, deque)):
            if len(value) <= _LONGEST:
                self._restorers.append(partial(refill, value, value.copy()))
            found += _entries(value)
        elif isinstance(value, tuple):
            found += _entries(value)
        if hasattr(value, "__dict__") and _is_looked_into(type(value)):
            self._restorers.append(partial(restore_attributes, vars(value), dict(vars(value))))
            found += list(vars(value).values())
        return found

    def restore(self) -> None:
        for restore in reversed(self._restorers):
            restore()


def _entries(container: Any) -> list[Any]:
    if len(container) > _LONG:
        return []
    return list(container.values() if isinstance(container, dict) else container)


def _is_looked_into(kind: type) -> bool:
    """Returns whether objects of a class are put back: those of Lightning, of torch's data, and of the user."""
    own = f"{kind.__module__}."
    if own.startswith(_LOOKED_INTO):
        # its processes go on, and it has to end them
        return not any("Launcher" in base.__name__ for base in kind.__mro__)
    return not is_from_library(kind.__module__) and kind.__module__ != "builtins"
