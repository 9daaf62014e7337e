"""Blocks after which modules are as they were before."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from lightning_ifthpo.core.module_state import ModuleState

_inside_restored: ContextVar[bool] = ContextVar("_inside_restored", default=False)


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
            states.append(ModuleState(module, complete=False))
            known.update(map(id, module.modules()))
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
