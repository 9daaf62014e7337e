"""The loss that the weights of any LightningModule minimize."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import Tensor, nn

from lightning_ifthpo.core.loss import NoLossError

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_Function = TypeVar("_Function", bound=Callable[..., Any])


def derived(function: _Function) -> _Function:
    """Marks a default of the mixin, which calls another method: `inner_loss`, or a step."""
    function.is_derived = True  # type: ignore[attr-defined]
    return function


def has_inner_loss(module: Any) -> bool:
    """Returns whether a module has an `inner_loss` that is not derived from its training step."""
    return _defines(module, "inner_loss")


def has_training_step(module: Any) -> bool:
    """Returns whether a module has a `training_step` that is not derived from its inner loss."""
    return _defines(module, "training_step")


def training_loss(module: Any, batch: Any) -> Tensor:
    """Returns the loss of a LightningModule on a batch, a scalar: `inner_loss`, or else the loss of `training_step`.

    Raises:
        NoLossError: If that is None.
        TypeError: If the training step returns something else without a loss.
    """
    if not has_inner_loss(module):
        return loss_of_training_step(module, batch)
    loss: Tensor = _required(module.inner_loss(batch), "inner_loss")
    return loss


def loss_of_training_step(module: Any, batch: Any) -> Tensor:
    """Calls the training step as the Trainer does and returns its loss; see `training_loss` for errors."""
    step = module.training_step
    kinds = [parameter.kind for parameter in inspect.signature(step).parameters.values()]
    several = inspect.Parameter.VAR_POSITIONAL in kinds or sum(kind in _POSITIONAL for kind in kinds) > 1
    value = step(batch, max(module.trainer.fit_loop.batch_idx, 0)) if several else step(batch)
    value = _required(value, "training_step")
    loss = value.get("loss") if isinstance(value, Mapping) else value
    if not isinstance(loss, Tensor):
        raise TypeError(
            f"expected training_step to return a loss, or a dict with the key 'loss', got {type(value).__name__}; "
            "define inner_loss(batch) to say what the weights minimize"
        )
    return loss


def _required(value: Any, name: str) -> Any:
    if value is None:
        raise NoLossError(f"{name} returned None, so there is no loss to differentiate on this batch")
    return value


def is_stub(step: Any) -> bool:
    """Returns whether a step is missing, or is Lightning's own, which does nothing."""
    return step is None or step.__module__.split(".")[0] in ("lightning", "pytorch_lightning")


def _defines(module: Any, name: str) -> bool:
    function = getattr(module, name, None)
    return callable(function) and not isinstance(function, nn.Module) and not getattr(function, "is_derived", False)
