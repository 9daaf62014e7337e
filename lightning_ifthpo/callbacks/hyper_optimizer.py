"""The optimizer of the hyperparameters."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from lightning_ifthpo.optimizers import PolyakRMSprop

_LONGEST_STEP, _LONGEST_TRAVEL = 0.5, 10.0  # units, in a step and in a horizon

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

    A step of the user's optimizer that is far too long is replaced by one of the default: if it moves a registered
    tensor or module by over half a unit, and by over ten units if it is kept up for a horizon. (A unit is a factor of
    e, for most of them; the sizes are root mean squares.) Such steps often lead to a state without hypergradients, from
    which there is no way back.

    Args:
        module: A LightningModule with the bilevel mixin, on its device.
        horizon: Number of hyper steps in which weights answer, for the default: `PolyakRMSprop`, if
            `configure_hyper_optimizer` returns None.

    Attributes:
        replaced: Number of steps that were replaced.

    Raises:
        TypeError: If `configure_hyper_optimizer` returns neither None nor one torch optimizer, alone or with one
            scheduler.
        ValueError: If the optimizer holds no hyperparameter or something else, its step needs a closure, or the
            scheduler belongs to another one.
    """

    def __init__(self, module: Any, horizon: float) -> None:
        configured = module.configure_hyper_optimizer()
        self._hyperparameters = list(module.hyperparameters())
        if configured is None:
            configured = _default(module, self._hyperparameters, horizon)
        optimizer, self._scheduler = _unpacked(configured)
        _check(optimizer, module)
        self._optimizer: Optimizer = optimizer
        self._masters = [_master(optimizer, hyperparameter) for hyperparameter in self._hyperparameters]
        is_own = isinstance(optimizer, PolyakRMSprop)
        self._substitute = None if is_own else _default(module, self._masters, horizon, held_by=optimizer)
        self._longest = max(_LONGEST_STEP, _LONGEST_TRAVEL / horizon)
        self.replaced = 0

    def step(self, gradients: Iterable[Tensor], loss: float) -> float:
        """Makes one step along gradients shaped like the hyperparameters, which belong to this outer loss.

        Returns:
            The largest root mean square by which the optimizer would have moved a registered hyperparameter, in units,
            if its step was replaced; else zero.
        """
        with torch.no_grad():
            triples = list(zip(self._hyperparameters, self._masters, gradients, strict=True))
            for hyperparameter, master, gradient in triples:
                if master is not hyperparameter:
                    value = hyperparameter.to(master.dtype)
                    master.copy_(torch.where(hyperparameter == master.to(hyperparameter.dtype), master, value))
                master.grad = gradient.to(master.dtype)
            excess = self._step(loss)
            if self._scheduler is not None:
                self._scheduler.step()
            for hyperparameter, master, _ in triples:
                master.grad = None
                if master is not hyperparameter:
                    hyperparameter.copy_(master)
        return excess

    def _step(self, loss: float) -> float:
        """Makes a step of the optimizer, or of its substitute if that is far too long; see `step`."""
        if self._substitute is None:
            self._optimizer.step(lambda: loss)
            return 0.0
        before = [master.clone() for master in self._masters]
        self._optimizer.step()
        moved = self._substitute.units_from(dict(zip(self._masters, before, strict=True)))
        if moved <= self._longest:
            return 0.0
        self.replaced += 1
        for master, value in zip(self._masters, before, strict=True):
            master.copy_(value)
        self._substitute.step(lambda: loss)
        return moved

    def state_dict(self) -> dict[str, Any]:
        """Returns the state of the optimizer, its scheduler and its substitute, and the master copies."""
        return {
            **self._optimizer.state_dict(),
            "masters": [master.detach() for master in self._copies],
            "scheduler": None if self._scheduler is None else self._scheduler.state_dict(),
            "substitute": None if self._substitute is None else self._substitute.state_dict(),
            "replaced": self.replaced,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores a result of `state_dict`."""
        state = state.copy()
        masters, scheduler, substitute = state.pop("masters"), state.pop("scheduler"), state.pop("substitute")
        self.replaced = state.pop("replaced")
        self._optimizer.load_state_dict(state)
        if self._scheduler is not None and scheduler is not None:
            self._scheduler.load_state_dict(scheduler)
        if self._substitute is not None and substitute is not None:
            self._substitute.load_state_dict(substitute)
        with torch.no_grad():
            for master, value in zip(self._copies, masters, strict=True):
                master.copy_(value)

    @property
    def units(self) -> list[float]:
        """What counts as a step of 1 at the start, for each hyperparameter; 1 for one that is not stepped."""
        default = self._optimizer if self._substitute is None else self._substitute
        units = {tensor: group["unit"] for group in default.param_groups for tensor in group["params"]}
        return [units.get(master, 1.0) for master in self._masters]

    @property
    def _copies(self) -> list[Tensor]:
        """The masters that are not the hyperparameters themselves."""
        pairs = zip(self._masters, self._hyperparameters, strict=True)
        return [master for master, hyperparameter in pairs if master is not hyperparameter]


def _default(module: Any, tensors: Iterable[Tensor], horizon: float, held_by: Optimizer | None = None) -> PolyakRMSprop:
    """Returns the optimizer that needs no learning rate, with a group for each registered tensor or module.

    Args:
        module: A LightningModule with the bilevel mixin.
        tensors: Its hyperparameters, or their master copies.
        horizon: Number of hyper steps in which weights answer.
        held_by: Another optimizer, whose tensors alone are taken; None for all.
    """
    held = None if held_by is None else {tensor for group in held_by.param_groups for tensor in group["params"]}
    groups: dict[str, list[Tensor]] = {}
    for (path, _), tensor in zip(module.named_hyperparameters(), tensors, strict=True):
        if held is None or tensor in held:
            groups.setdefault(path.split(".")[0], []).append(tensor)
    units = {name: getattr(getattr(module, name), "unit", None) for name in groups}
    return PolyakRMSprop(
        [
            {"params": tensors, "unit": units[name] if isinstance(units[name], float) else None}
            for name, tensors in groups.items()
        ],
        horizon=horizon,
    )


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
            "expected configure_hyper_optimizer to return None, one torch optimizer, or {'optimizer': ..., "
            f"'lr_scheduler': ...}} with one scheduler, got {configured!r}"
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
