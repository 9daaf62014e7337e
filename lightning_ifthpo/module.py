"""The mixin that makes a LightningModule bilevel."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ifthpo.core.space import check_real
from lightning_ifthpo.curvature import mark_outputs

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


class BilevelLightningModule:
    """Adds hyperparameters, an inner and an outer loss to a LightningModule; name it first among the bases.

    Hyperparameters are frozen parameters of the module: they move with it and live in its checkpoints, while an
    optimizer built from `self.parameters()` neither trains nor decays them. `IFTHypergradient` updates them.

    Define `outer_loss(batch)`, and either `inner_loss(batch)` or `training_step`; what is not defined follows from the
    other: `training_step` logs and returns `inner_loss`, `validation_step` logs `outer_loss`. The losses must return a
    scalar tensor and may use dropout, BatchNorm, metrics and `self.log`: while the callback evaluates them, nothing of
    that leaves a trace, nor does what they do to attributes of the module: rebinding them, changing tensors in place,
    appending to a list. Effects elsewhere (a file, a list in a list, a hook's own memory) cannot be undone.

    >>> import lightning as L
    >>> class Ridge(BilevelLightningModule, L.LightningModule):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.linear = nn.Linear(3, 1)
    ...         self.register_hyperparameter("log_decay", torch.tensor(-2.0))
    ...     def inner_loss(self, batch):
    ...         x, y = batch
    ...         penalty = self.log_decay.exp() * self.linear.weight.square().sum() / 2
    ...         return nn.functional.mse_loss(self.linear(x), y) + penalty
    ...     def outer_loss(self, batch):
    ...         x, y = batch
    ...         return nn.functional.mse_loss(self.linear(x), y)
    >>> [name for name, _ in Ridge().named_hyperparameters()]
    ['log_decay']
    """

    _hyperparameter_names: tuple[str, ...] = ()

    def __init_subclass__(cls, **options: Any) -> None:
        """Gives the class a training and a validation step where no base class has one."""
        super().__init_subclass__(**options)
        for name, default in (("training_step", _training_step), ("validation_step", _validation_step)):
            if _is_stub(getattr(cls, name, None)):
                setattr(cls, name, default)

    def register_hyperparameter(self, name: str, value: Tensor | nn.Module) -> None:
        """Makes a tensor, or all parameters of a module, hyperparameters under `self.<name>`.

        Args:
            name: Attribute name, not yet taken.
            value: A real floating-point tensor of any shape, which is copied; or a module with at least one parameter.

        Raises:
            ValueError: If the name is taken or no identifier, or the module has no parameter.
            TypeError: If the value is neither, or a tensor is not a real floating-point one.
        """
        if not name.isidentifier():
            raise ValueError(f"expected a hyperparameter name that is a Python identifier, got {name!r}")
        if name in self._hyperparameter_names:
            raise ValueError(f"hyperparameter {name!r} is registered twice; choose another name for one of them")
        if hasattr(type(self), name) or hasattr(self, name):
            raise ValueError(f"{type(self).__name__} already has an attribute {name!r}; choose another name")
        if isinstance(value, nn.Module):
            parameters = dict(value.named_parameters())
            if not parameters:
                raise ValueError(f"hyperparameter {name!r}: {type(value).__name__} has no parameters to tune")
            for path, parameter in parameters.items():
                check_real(parameter, f"hyperparameter '{name}.{path}'")
            setattr(self, name, value.requires_grad_(False))
        else:
            check_real(value, f"hyperparameter {name!r}")
            setattr(self, name, nn.Parameter(value.detach().clone(), requires_grad=False))
        self._hyperparameter_names = (*self._hyperparameter_names, name)

    def named_hyperparameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yields (name, tensor) for each hyperparameter; those of a registered module as "<name>.<its own name>"."""
        seen: set[int] = set()
        for name in self._hyperparameter_names:
            value = getattr(self, name)
            pairs = value.named_parameters(prefix=name) if isinstance(value, nn.Module) else [(name, value)]
            for path, parameter in pairs:
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    yield path, parameter

    def hyperparameters(self) -> Iterator[nn.Parameter]:
        """Yields the hyperparameter tensors."""
        for _, parameter in self.named_hyperparameters():
            yield parameter

    def named_inner_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yields (name, tensor) for each parameter of the module that is not a hyperparameter: the weights."""
        hyperparameters = {id(parameter) for parameter in self.hyperparameters()}
        for name, parameter in _module(self).named_parameters():
            if id(parameter) not in hyperparameters:
                yield name, parameter

    def inner_parameters(self) -> Iterator[nn.Parameter]:
        """Yields the weights, for the optimizer of `configure_optimizers`."""
        for _, parameter in self.named_inner_parameters():
            yield parameter

    def mark_outputs(self, output: Tensor) -> Tensor:
        """Returns the output unchanged, and tells Gauss–Newton curvature that the model ends here."""
        return mark_outputs(output)

    def inner_loss(self, batch: Any) -> Tensor:
        """Returns L_T(λ, w) on a training batch, a scalar: what the weights minimize.

        The default is the loss of `training_step`.
        """
        if not self.trains_by_itself:
            raise NotImplementedError(f"{type(self).__name__} needs inner_loss(batch), or training_step")
        return _loss_of_step(_module(self), batch)

    def outer_loss(self, batch: Any) -> Tensor:
        """Returns L_V(λ, w) on an outer batch, a scalar: what the hyperparameters minimize; evaluated in eval mode."""
        raise NotImplementedError(f"{type(self).__name__} needs outer_loss(batch): what the hyperparameters minimize")

    def outer_dataloader(self) -> Any:
        """Returns the loader of outer batches; None leaves it to the data module or the callback."""
        return None

    def configure_hyper_optimizer(self) -> torch.optim.Optimizer:
        """Returns the optimizer of the hyperparameters; by default Adam with learning rate 1e-2."""
        return torch.optim.Adam(self.hyperparameters(), lr=1e-2)

    @property
    def trains_by_itself(self) -> bool:
        """Whether there is a training step that is not made of `inner_loss`."""
        return _module(type(self)).training_step is not _training_step

    @property
    def defines_inner_loss(self) -> bool:
        """Whether there is an `inner_loss` that is not made of `training_step`."""
        return has_inner_loss(self)


def training_loss(module: Any, batch: Any) -> Tensor:
    """Returns what the weights of any LightningModule minimize on a batch, a scalar.

    That is its `inner_loss`, with the mixin or without, or else the loss of its `training_step`.
    """
    loss: Tensor = module.inner_loss(batch) if has_inner_loss(module) else _loss_of_step(module, batch)
    return loss


def has_inner_loss(module: Any) -> bool:
    """Returns whether a module says what its weights minimize, beside its training step."""
    function = getattr(module, "inner_loss", None)
    inherited = getattr(function, "__func__", None) is BilevelLightningModule.inner_loss
    return callable(function) and not inherited and not isinstance(function, nn.Module)


def _module(mixin: object) -> Any:
    """The mixin seen as the LightningModule that it is part of."""
    return mixin


def _is_stub(step: Any) -> bool:
    """Whether a step is missing, or Lightning's own, which does nothing."""
    return step is None or step.__module__.split(".")[0] in ("lightning", "pytorch_lightning")


def _training_step(self: Any, batch: Any, batch_idx: int) -> Tensor:
    """Returns and logs `inner_loss`."""
    loss: Tensor = self.inner_loss(batch)
    self.log("inner_loss", loss, prog_bar=True)
    return loss


def _validation_step(self: Any, batch: Any, batch_idx: int) -> Tensor:
    """Logs `outer_loss`."""
    loss: Tensor = self.outer_loss(batch)
    self.log("outer_loss", loss, prog_bar=True)
    return loss


def _loss_of_step(module: Any, batch: Any) -> Tensor:
    """Calls the training step as the Trainer does, with the arguments that it takes."""
    step = module.training_step
    parameters = inspect.signature(step).parameters
    kinds = [parameter.kind for parameter in parameters.values()]
    several = inspect.Parameter.VAR_POSITIONAL in kinds or sum(kind in _POSITIONAL for kind in kinds) > 1
    value = step(batch, max(module.trainer.fit_loop.batch_idx, 0)) if several else step(batch)
    loss = value.get("loss") if isinstance(value, Mapping) else value
    if not isinstance(loss, Tensor):
        raise TypeError(
            f"expected training_step to return a loss, or a dict with the key 'loss', got {type(value).__name__}; "
            "define inner_loss(batch) to say what the weights minimize"
        )
    return loss
