"""Models whose weights are spread over processes by `fully_shard` (FSDP2), put together for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor

from lightning_ifthpo.core.space import full_tensor


@contextmanager
def unsharded(module: nn.Module) -> Iterator[None]:
    """Makes a module inside the block what it would be on one device: its parameters whole, without FSDP's hooks.

    Those have no second derivative. What becomes of the weights inside the block is lost. In a module without sharded
    parameters nothing changes.

    Cost: one collective for each sharded parameter, and the memory of all of them.
    """
    gathered: dict[int, nn.Parameter] = {}  # a parameter may be shared
    with ExitStack() as stack:
        for submodule in module.modules():
            for name, parameter in list(submodule._parameters.items()):
                if isinstance(parameter, DTensor):
                    if id(parameter) not in gathered:
                        gathered[id(parameter)] = nn.Parameter(full_tensor(parameter).detach(), parameter.requires_grad)
                    stack.callback(submodule._parameters.__setitem__, name, parameter)
                    submodule._parameters[name] = gathered[id(parameter)]
        for submodule in module.modules() if gathered else ():
            for hooks in (submodule._forward_pre_hooks, submodule._forward_hooks):
                stack.enter_context(_without_sharding(hooks))
        yield


def is_sharded(tensor: Any) -> bool:
    """Returns whether each process holds a part of a tensor only."""
    return isinstance(tensor, DTensor)


@contextmanager
def _without_sharding(hooks: dict[int, Any]) -> Iterator[None]:
    """Takes out the hooks that gather and spread weights around a forward pass; the order stays."""
    before = hooks.copy()
    for key, hook in before.items():
        if type(getattr(hook, "__self__", None)).__module__.startswith("torch.distributed."):
            del hooks[key]
    try:
        yield
    finally:
        hooks.clear()
        hooks.update(before)
