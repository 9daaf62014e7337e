"""Models that `fully_shard` (FSDP2) spreads over processes: full parameters inside a block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor

from lightning_ifthpo.core.space import full_tensor


@contextmanager
def unsharded(module: nn.Module) -> Iterator[None]:
    """Gives a sharded module full parameters and no FSDP hooks inside the block; other modules stay as they are.

    FSDP's hooks have no second derivative. Changes of the weights inside the block are discarded.

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
            # Private: torch has no public list of a module's hooks.
            for hooks in (submodule._forward_pre_hooks, submodule._forward_hooks):
                stack.enter_context(_without_sharding(hooks))
        yield


@contextmanager
def _without_sharding(hooks: dict[int, Any]) -> Iterator[None]:
    """Removes FSDP's hooks inside the block, and restores all hooks, in order, after it."""
    before = hooks.copy()
    for key, hook in before.items():
        if type(getattr(hook, "__self__", None)).__module__.startswith("torch.distributed."):
            del hooks[key]
    try:
        yield
    finally:
        hooks.clear()
        hooks.update(before)
