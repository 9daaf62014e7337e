"""The optimizer of the hyperparameters."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

# What Lightning accepts beside a scheduler, and holds here too
_NAMES = ("scheduler", "name")
_KEPT = (("interval", "step"), ("frequency", 1))


class HyperOptimizer:
    """Makes the steps of a module's hyper-optimizer, in float32 where a hyperparameter is in half precision.

    In bfloat16 numbers near 9 are 0.06 apart, and steps of 0.01 are lost; in float16 Adam's squares of small gradients
    and its eps are zero. So a hyperparameter in half precision has a master copy in float32, which takes its place in
    the optimizer. After a step the rounded master copy is written to the module. If something else has changed a value
    in the module meanwhile, the master copy takes that value.

    A scheduler that `configure_hyper_optimizer` returns makes a step after each hyper step.

    Args:
        module: A LightningModule with the bilevel mixin, on its device.

    Raises:
        TypeError: If `configure_hyper_optimizer` does not return one torch optimizer, alone or with one scheduler.
        ValueError: If the optimizer holds no hyperparameter or something else, its step needs a closure, or the
            scheduler belongs to another one.
    """

    def __init__(self, module: Any) -> None:
        optimizer, self._scheduler = _unpacked(module.configure_hyper_optimizer())
        _check(optimizer, module)
        self._optimizer: Optimizer = optimizer
        self._hyperparameters = list(module.hyperparameters())
        self._masters = [_master(optimizer, hyperparameter) for hyperparameter in self._hyperparameters]

    def step(self, gradients: Iterable[Tensor]) -> None:
        """Makes one step along gradients shaped like the hyperparameters."""
        with torch.no_grad():
            triples = list(zip(self._hyperparameters, self._masters, gradients, strict=True))
            for hyperparameter, master, gradient in triples:
                if master is not hyperparameter:
                    value = hyperparameter.to(master.dtype)
                    master.copy_(torch.where(hyperparameter == master.to(hyperparameter.dtype), master, value))
                master.grad = gradient.to(master.dtype)
            self._optimizer.step()
            if self._scheduler is not None:
                self._scheduler.step()
            for hyperparameter, master, _ in triples:
                master.grad = None
                if master is not hyperparameter:
                    hyperparameter.copy_(master)

    def state_dict(self) -> dict[str, Any]:
        """Returns the state of the optimizer and its scheduler, and the master copies."""
        return {
            **self._optimizer.state_dict(),
            "masters": [master.detach() for master in self._copies],
            "scheduler": None if self._scheduler is None else self._scheduler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores a result of `state_dict`."""
        state = state.copy()
        masters, scheduler = state.pop("masters"), state.pop("scheduler")
        self._optimizer.load_state_dict(state)
        if self._scheduler is not None and scheduler is not None:
            self._scheduler.load_state_dict(scheduler)
        with torch.no_grad():
            for master, value in zip(self._copies, masters, strict=True):
                master.copy_(value)

    @property
    def _copies(self) -> list[Tensor]:
        """The masters that are not the hyperparameters themselves."""
        pairs = zip(self._masters, self._hyperparameters, strict=True)
        return [master for master, hyperparameter in pairs if master is not hyperparameter]


def _master(optimizer: Optimizer, hyperparameter: nn.Parameter) -> nn.Parameter:
    """Returns a hyperparameter, or, in half precision, a copy in float32 that has taken its place in the optimizer."""
    half = hyperparameter.dtype
    if half not in (torch.float16, torch.bfloat16):
        return hyperparameter
    master = nn.Parameter(hyperparameter.detach().float(), requires_grad=False)
    for group in optimizer.param_groups:
        group["params"][:] = [master if tensor is hyperparameter else tensor for tensor in group["params"]]
    for name, value in optimizer.state.pop(hyperparameter, {}).items():  # Adagrad has a state before its first step
        is_half = isinstance(value, Tensor) and value.dtype is half
        optimizer.state[master][name] = value.float() if is_half else value
    return master


def _unpacked(configured: Any) -> tuple[Optimizer, LRScheduler | None]:
    """Returns the optimizer, and the scheduler if there is one, from what Lightning accepts for a single optimizer.

    Raises:
        TypeError: If it is anything else.
    """
    optimizer, scheduler = configured, None
    if isinstance(configured, dict):
        optimizer, scheduler = configured.get("optimizer"), configured.get("lr_scheduler")
    elif isinstance(configured, (list, tuple)) and len(configured) == 2 and all(map(_is_list, configured)):
        optimizers, schedulers = configured
        if len(optimizers) == 1 and len(schedulers) <= 1:
            optimizer, scheduler = optimizers[0], next(iter(schedulers), None)
    if isinstance(scheduler, dict):
        ignored = {key: scheduler[key] for key in scheduler if (key, scheduler[key]) not in _KEPT and key not in _NAMES}
        if ignored:
            raise TypeError(
                f"a scheduler of the hyper-optimizer makes a step after each hyper step, and {ignored} asks for "
                "another time; leave it out"
            )
        scheduler = scheduler.get("scheduler")
    if not isinstance(optimizer, Optimizer) or not isinstance(scheduler, LRScheduler | None):
        raise TypeError(
            "expected configure_hyper_optimizer to return one torch optimizer, or {'optimizer': ..., 'lr_scheduler': "
            f"...}} with one scheduler, got {configured!r}"
        )
    if isinstance(scheduler, ReduceLROnPlateau):
        raise TypeError(
            "ReduceLROnPlateau waits for a metric, and hyper steps have the loss of one batch; use another scheduler "
            "for the hyper-optimizer"
        )
    if scheduler is not None and scheduler.optimizer is not optimizer:
        raise ValueError("the scheduler of the hyper-optimizer belongs to another optimizer; create it with this one")
    return optimizer, scheduler


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple))


def _check(optimizer: Optimizer, module: Any) -> None:
    """Raises an error in words unless an optimizer can make hyper steps."""
    hyperparameters = set(module.hyperparameters())
    weights = {weight: name for name, weight in module.named_inner_parameters()}
    held = [tensor for group in optimizer.param_groups for tensor in group["params"]]
    if not held:
        raise ValueError("the hyper-optimizer is empty; build it from self.hyperparameters()")
    for tensor in held:
        if tensor not in hyperparameters:
            what = f"the weight {weights[tensor]!r}" if tensor in weights else "a tensor that is no hyperparameter"
            raise ValueError(
                f"the hyper-optimizer holds {what} of {type(module).__name__}; build it from self.hyperparameters()"
            )
        tensor.grad = None
    try:
        # does nothing without gradients; a copy has no hooks, which would see a step that is none
        copy.deepcopy(optimizer).step()
    except Exception as error:
        if "closure" in str(error):
            raise ValueError(
                f"{type(optimizer).__name__} needs a closure, which evaluates the loss several times, and a hyper step "
                "has one gradient; use another optimizer for the hyperparameters, such as Adam"
            ) from error
