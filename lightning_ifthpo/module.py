"""The mixin that makes a LightningModule bilevel."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from typing_extensions import Self

from lightning_ifthpo.core.marking import mark_outputs
from lightning_ifthpo.core.space import check_real
from lightning_ifthpo.training_loss import derived, has_training_step, is_stub, loss_of_training_step

_LOG = logging.getLogger("lightning.pytorch")  # which Lightning shows on the console

HyperparameterValue: TypeAlias = float | Tensor | dict[str, float | Tensor]
"""A number, a tensor, or one of them for each part."""


class BilevelLightningModule:
    """Adds hyperparameters, an inner and an outer loss to a LightningModule; name it first among the bases.

    Hyperparameters are frozen parameters of the module: they move with it and are saved in its checkpoints, and an
    optimizer built from `self.parameters()` neither trains nor decays them. `IFTHypergradient` updates them, and keeps
    them frozen during training. A checkpoint of the plain class can be loaded; the other way needs `strict=False`.

    Define `outer_loss(batch)`, and either `inner_loss(batch)` or `training_step`. By default `training_step` logs and
    returns `inner_loss`, and `validation_step` `outer_loss`. The losses must return a scalar tensor, and may use
    dropout, BatchNorm, metrics and `self.log`. When the callback evaluates them, it undoes side effects on the module,
    see `lightning_ifthpo.core.module_state.ModuleState`. It cannot undo others (a file, a global variable).

    >>> import lightning as L
    >>> class Ridge(BilevelLightningModule, L.LightningModule):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.linear = nn.Linear(3, 1)
    ...         self.register_hyperparameter("log_decay", torch.tensor(-2.0))
    ...     def inner_loss(self, batch):
    ...         return self.outer_loss(batch) + self.log_decay.exp() * self.linear.weight.square().sum() / 2
    ...     def outer_loss(self, batch):
    ...         x, y = batch
    ...         return nn.functional.mse_loss(self.linear(x), y)
    >>> [name for name, _ in Ridge().named_hyperparameters()]
    ['log_decay']
    """

    _hyperparameter_names: tuple[str, ...] = ()
    _versions: tuple[tuple[int, int], ...] = ()  # of hyperparameters when they were registered
    has_fixed_hyperparameters = False
    """Whether `freeze_hyperparameters` was called."""

    def __init_subclass__(cls, **options: Any) -> None:
        """Gives the class a training and a validation step where no base class has one."""
        super().__init_subclass__(**options)
        if is_stub(getattr(cls, "training_step", None)):
            cls.training_step = _step_with("inner_loss")  # type: ignore[attr-defined]
        if is_stub(getattr(cls, "validation_step", None)):
            # a checkpoint may be chosen by it, so that all processes have to agree
            cls.validation_step = _step_with("outer_loss", sync_dist=True)  # type: ignore[attr-defined]

    def register_hyperparameter(self, name: str, value: Tensor | nn.Module) -> None:
        """Makes a tensor, or all parameters of a module, hyperparameters under `self.<name>`.

        Args:
            name: Attribute name, not yet taken.
            value: A real floating-point tensor of any shape, which is copied; or a module with at least one parameter.

        Raises:
            ValueError: If the name is taken or no identifier, or the module has no parameter.
            TypeError: If the value is neither, or a tensor is not real and floating-point.
        """
        if not name.isidentifier():
            raise ValueError(f"expected a hyperparameter name that is a Python identifier, got {name!r}")
        if name in self._hyperparameter_names:
            raise ValueError(f"hyperparameter {name!r} is registered twice; choose another name for one of them")
        if hasattr(type(self), name) or hasattr(self, name):
            raise ValueError(f"{type(self).__name__} already has an attribute {name!r}; choose another name")
        if isinstance(value, nn.Module):
            if not any(True for _ in value.parameters()):
                raise ValueError(f"hyperparameter {name!r}: {type(value).__name__} has no parameters to tune")
            for path, parameter in value.named_parameters(prefix=name):
                check_real(parameter, f"hyperparameter {path!r}")
            setattr(self, name, value.requires_grad_(False))
        else:
            check_real(value, f"hyperparameter {name!r}")
            setattr(self, name, nn.Parameter(value.detach().clone(), requires_grad=False))
        self._hyperparameter_names = (*self._hyperparameter_names, name)
        self._versions = _versions_of(self.hyperparameters())

    def named_hyperparameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yields (name, tensor) for each hyperparameter; "<name>.<own name>" for tensors of a registered module."""
        names: dict[nn.Parameter, str] = {}  # a tensor's hash is its identity: a shared one is yielded once
        for name in self._hyperparameter_names:
            value = getattr(self, name)
            pairs = value.named_parameters(prefix=name) if isinstance(value, nn.Module) else [(name, value)]
            for path, tensor in pairs:
                names.setdefault(tensor, path)
        yield from ((path, tensor) for tensor, path in names.items())

    def hyperparameters(self) -> Iterator[nn.Parameter]:
        """Yields the hyperparameter tensors."""
        return (parameter for _, parameter in self.named_hyperparameters())

    def named_inner_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yields (name, tensor) for each parameter of the module that is not a hyperparameter: the weights."""
        hyperparameters = set(self.hyperparameters())
        for name, parameter in self.named_parameters():  # type: ignore[attr-defined]
            if parameter not in hyperparameters:
                yield name, parameter

    def inner_parameters(self) -> Iterator[nn.Parameter]:
        """Yields the weights, for the optimizer of `configure_optimizers`."""
        return (parameter for _, parameter in self.named_inner_parameters())

    def hyperparameter_values(self) -> dict[str, HyperparameterValue]:
        """Returns what each hyperparameter means at present: a number, a tensor, or one of them for each part.

        Ready-made hyperparameters give natural units (a decay and not its logarithm), by their `natural_values`. A
        registered tensor gives itself, and another module its tensors by their names. Tensors are copies on the CPU.
        """
        return {
            name: {part: _plain(tensor) for part, tensor in value.items()} if isinstance(value, dict) else _plain(value)
            for name, value in self.named_natural_values()
        }

    def named_natural_values(self) -> Iterator[tuple[str, Tensor | dict[str, Tensor]]]:
        """Yields each hyperparameter's name, and what `hyperparameter_values` is made of: detached, on its device."""
        for name in self._hyperparameter_names:
            yield name, _natural_values(getattr(self, name))

    def freeze_hyperparameters(self) -> Self:
        """Keeps the hyperparameters at their present values, and returns the module.

        Call it before `fit` to train again with tuned values. `IFTHypergradient` then makes no hyper steps and needs no
        outer data. A checkpoint does not remember the call.
        """
        self.has_fixed_hyperparameters = True
        return self

    @property
    def is_left_untuned(self) -> bool:
        """Whether the hyperparameters are as they were registered, and nothing in the Trainer moves them.

        False after `freeze_hyperparameters`, and after values were loaded or set.
        """
        callbacks: Any = self.trainer.callbacks  # type: ignore[attr-defined]
        is_unmoved = self._versions == _versions_of(self.hyperparameters())
        is_tuned = any(getattr(callback, "moves_hyperparameters", False) for callback in callbacks)
        return bool(self._versions) and is_unmoved and not is_tuned and not self.has_fixed_hyperparameters

    def on_train_start(self) -> None:
        """Says in a line if nothing tunes the hyperparameters."""
        super().on_train_start()  # type: ignore[misc]
        if self.trainer.is_global_zero and self.is_left_untuned:  # type: ignore[attr-defined]
            names = ", ".join(map(repr, self._hyperparameter_names))
            _LOG.info(
                f"{type(self).__name__}: nothing tunes the hyperparameters {names}, which stay as they are: there is "
                "no IFTHypergradient among the callbacks. If this is meant, call freeze_hyperparameters()"
            )

    def unfreeze(self) -> Self:
        """Unfreezes the weights, as Lightning does, and returns the module; hyperparameters stay frozen."""
        super().unfreeze()  # type: ignore[misc]
        for hyperparameter in self.hyperparameters():
            hyperparameter.requires_grad_(False)
        return self

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Completes a checkpoint without hyperparameters, such as one of the plain class, by the present values."""
        super().on_load_checkpoint(checkpoint)  # type: ignore[misc]
        loaded: dict[str, Any] | None = checkpoint.get("state_dict")
        if loaded is None:  # a sharded checkpoint loads its tensors by itself
            return
        own: dict[str, Any] = self.state_dict()  # type: ignore[attr-defined]
        missing = {
            key: value
            for key, value in own.items()
            if key not in loaded and key.split(".")[0] in self._hyperparameter_names
        }
        if missing:
            loaded.update(missing)
            warnings.warn(
                f"the checkpoint has no values of {', '.join(map(repr, missing))}; the module keeps its own",
                stacklevel=2,
            )

    def mark_outputs(self, output: Tensor) -> Tensor:
        """Returns the output unchanged; Gauss–Newton curvature takes it as the output of the model."""
        return mark_outputs(output)

    @derived
    def inner_loss(self, batch: Any) -> Tensor:
        """Returns L_T(λ, w) on a training batch, the scalar that weights minimize; by default from `training_step`."""
        if not has_training_step(self):
            raise NotImplementedError(f"{type(self).__name__} needs inner_loss(batch), or training_step")
        return loss_of_training_step(self, batch)

    def outer_loss(self, batch: Any) -> Tensor:
        """Returns L_V(λ, w) on an outer batch, in eval mode: a scalar that the hyperparameters minimize."""
        raise NotImplementedError(f"{type(self).__name__} needs outer_loss(batch): what the hyperparameters minimize")

    def outer_dataloader(self) -> Any:
        """Returns the loader of outer batches, or None if the data module or the callback has one; by default None.

        A loader may be assigned in place of this method.
        """
        return None

    def configure_hyper_optimizer(self) -> Any:
        """Returns the optimizer of the hyperparameters; None, the default, for one that needs no learning rate.

        That is `lightning_ifthpo.optimizers.PolyakRMSprop`. With a scheduler, as in Lightning: {"optimizer": ...,
        "lr_scheduler": ...}. It makes a step after each hyper step.
        """
        return None


def _versions_of(parameters: Iterator[nn.Parameter]) -> tuple[tuple[int, int], ...]:
    """Returns what changes when a parameter is replaced or written to."""
    return tuple((id(parameter), parameter._version) for parameter in parameters)


def _natural_values(value: Tensor | nn.Module) -> Tensor | dict[str, Tensor]:
    """Returns what a registered tensor or module means: in natural units if it has `natural_values`, detached."""
    if isinstance(value, Tensor):
        return value.detach()
    with torch.no_grad():
        natural: Any = getattr(value, "natural_values", lambda: dict(value.named_parameters()))
        found: Tensor | dict[str, Tensor] = natural()
    return {part: tensor.detach() for part, tensor in found.items()} if isinstance(found, dict) else found.detach()


def _plain(tensor: Tensor) -> float | Tensor:
    return tensor.item() if tensor.numel() == 1 else tensor.to("cpu", copy=True)


def _step_with(loss_name: str, *, sync_dist: bool = False) -> Callable[[Any, Any, int], Tensor | None]:
    """Returns a training or validation step that logs and returns a loss of the module."""

    @derived
    def step(self: Any, batch: Any, batch_idx: int) -> Tensor | None:
        loss: Tensor | None = getattr(self, loss_name)(batch)
        if loss is not None:  # a training step without a loss skips the batch
            self.log(loss_name, loss, prog_bar=True, sync_dist=sync_dist)
        return loss

    return step
