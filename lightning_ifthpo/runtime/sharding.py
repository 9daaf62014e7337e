"""Full tensors, for the time of a block, of models that `fully_shard` (FSDP2) spreads over processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor

from lightning_ifthpo.core.space import full_tensor


@contextmanager
def unsharded(module: nn.Module) -> Iterator[None]:
    """Gives a module, inside the block, full parameters and no FSDP hooks, as on one device.

    FSDP's hooks have no second derivative. Changes of the weights inside the block are discarded. A module without
    sharded parameters stays as it is.

    Cost: one collective for each sharded parameter, and the memory of all full parameters.
    """
    gathered: dict[int, nn.Parameter] = {}  # a parameter may be shared
    with ExitStack() as stack:
        for submodule in module.modules():
            for name, parameter in list(submodule.named_parameters(recurse=False, remove_duplicate=False)):
                if isinstance(parameter, DTensor):
                    if id(parameter) not in gathered:
                        gathered[id(parameter)] = nn.Parameter(full_tensor(parameter).detach(), parameter.requires_grad)
                    stack.callback(setattr, submodule, name, parameter)
                    setattr(submodule, name, gathered[id(parameter)])
        for submodule in module.modules() if gathered else ():
            # private: torch offers no public list of the hooks of a module
            for hooks in (submodule._forward_pre_hooks, submodule._forward_hooks):
                stack.enter_context(_without_sharding(hooks))
        yield


def is_sharded(tensor: Any) -> bool:
    """Returns whether a tensor is spread over processes, so that each holds only a part."""
    return isinstance(tensor, DTensor)


@contextmanager
def _without_sharding(hooks: dict[int, Any]) -> Iterator[None]:
    """Removes the hooks that gather and release weights around a forward pass; restores all hooks, in order, after."""
    before = hooks.copy()
    for key, hook in before.items():
        if type(getattr(hook, "__self__", None)).__module__.startswith("torch.distributed."):
            del hooks[key]
    try:
        yield
    finally:
        hooks.clear()
        hooks.update(before)
