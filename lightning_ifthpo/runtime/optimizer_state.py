"""States of inner optimizers in checkpoints of plain modules."""

from __future__ import annotations

from itertools import count
from typing import Any

from torch.optim import Optimizer


def include_hyperparameters(state: dict[str, Any], optimizer: Optimizer, module: Any) -> None:
    """Gives the hyperparameters in an optimizer a place in a saved state of a plain module, in place.

    An optimizer built from `self.parameters()` holds the hyperparameters of a bilevel module too, although it does not
    move them, and torch refuses a state with fewer parameters. Any other state stays as it is.

    Args:
        state: A result of the `state_dict` of an optimizer.
        optimizer: The optimizer that will load it.
        module: A LightningModule with the bilevel mixin.
    """
    hyperparameters = set(module.hyperparameters())
    groups = state["param_groups"]
    places = [[tensor in hyperparameters for tensor in group["params"]] for group in optimizer.param_groups]
    if [len(group["params"]) for group in groups] != [place.count(False) for place in places]:
        return
    unused = count(1 + max((number for group in groups for number in group["params"]), default=-1))
    for group, place in zip(groups, places, strict=True):
        numbers = iter(group["params"])
        group["params"] = [next(unused) if is_new else next(numbers) for is_new in place]
