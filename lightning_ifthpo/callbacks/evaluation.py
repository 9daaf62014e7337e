"""Evaluating a module's losses inside a training run as if nobody had."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Literal, TypeAlias

import lightning as L
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_ifthpo.autodiff import gradients_on
from lightning_ifthpo.callbacks.sharding import unsharded
from lightning_ifthpo.callbacks.snapshot import restored
from lightning_ifthpo.module import training_loss
from lightning_ifthpo.random_state import PROCESS_STRIDE, isolated

CurvaturePrecision: TypeAlias = Literal["32", "inherit"]
BY_DIFFERENCES = ("finite_difference", "three_point")  # of gradients or of losses


@contextmanager
def undisturbed(trainer: L.Trainer, module: L.LightningModule, seed: int) -> Iterator[None]:
    """Puts back all that an evaluation of the module's losses inside the block may leave behind.

    That is what `restored` puts back of the module, what is logged, and the random state, which is seeded inside the
    block so that each evaluation draws the same numbers wherever a run was resumed. Gradients need no care as long as
    `torch.autograd.grad` is used.
    """
    with ExitStack() as stack:
        stack.enter_context(isolated(module.device, _own_seed(trainer, seed)))
        stack.enter_context(restored(module))
        stack.callback(setattr, trainer, "loggers", trainer.loggers)
        trainer.loggers = [DummyLogger()]  # which takes all calls, as under fast_dev_run
        vars(module).update(log=_ignore, log_dict=_ignore)
        yield


@contextmanager
def twice_differentiable(module: nn.Module) -> Iterator[None]:
    """Chooses kernels with a second derivative: no compiled graphs, no fused attention, no cuDNN recurrence."""
    recurrent = any(isinstance(submodule, nn.RNNBase) for submodule in module.modules())
    with torch.compiler.set_stance("force_eager"), sdpa_kernel(SDPBackend.MATH), ExitStack() as stack:
        if recurrent:
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        yield


class Losses:
    """A module's losses as functions of a batch, in the precision and the mode that belong to them.

    Make one inside `undisturbed`. The inner loss is evaluated in the modes the module was found in, the outer loss in
    eval mode, as in validation. A mode lasts until the next evaluation, because activation checkpointing repeats the
    forward pass during the backward pass.

    Args:
        trainer: Whose precision plugin is used.
        module: The module, with an inner loss or a training step, and with `outer_loss` where that is evaluated.
        precision: "32" evaluates without autocast; "inherit" as training does.
    """

    def __init__(self, trainer: L.Trainer, module: Any, precision: CurvaturePrecision) -> None:
        self._module = module
        self._modes = {submodule: submodule.training for submodule in module.modules()}
        plugin = trainer.precision_plugin
        autocasts = "mixed" in str(plugin.precision)
        self._context = _no_context if autocasts and precision == "32" else plugin.forward_context

    def inner(self, batch: Any) -> Callable[[], Tensor]:
        """Returns the inner loss on a batch, as a callable without arguments."""
        return lambda: self._evaluate(partial(training_loss, self._module), batch, training=True)

    def outer(self, batch: Any) -> Callable[[], Tensor]:
        """Returns the outer loss on a batch, as a callable without arguments."""
        return lambda: self._evaluate(self._module.outer_loss, batch, training=False)

    def _evaluate(self, loss: Callable[[Any], Tensor], batch: Any, *, training: bool) -> Tensor:
        for submodule, mode in self._modes.items():
            submodule.training = mode and training
        with self._context():
            return loss(copied(batch))


@contextmanager
def evaluating(
    trainer: L.Trainer, module: L.LightningModule, seed: int, curvature: str, precision: CurvaturePrecision = "32"
) -> Iterator[Losses]:
    """Gives a module's losses, to be differentiated twice unless by differences; nothing they do is kept.

    Inside the block the module is whole: take its parameters there.
    """
    with ExitStack() as stack:
        stack.enter_context(unsharded(module))
        stack.enter_context(undisturbed(trainer, module, seed))
        stack.enter_context(gradients_on())
        if curvature not in BY_DIFFERENCES:
            stack.enter_context(twice_differentiable(module))
        yield Losses(trainer, module, precision)


def copied(batch: Any) -> Any:
    """Returns a copy of a batch, which may be changed in place and taken apart."""
    return apply_to_collection(batch, Tensor, Tensor.clone)


def prepared(trainer: L.Trainer, module: L.LightningModule, batch: Any, seed: int) -> Any:
    """Returns a copy of a batch on the device, converted as in validation; random transforms draw from a seed."""
    trainer.validating = True  # augmentations that ask self.trainer.training must not touch it
    try:
        with isolated(module.device, _own_seed(trainer, seed)):
            batch = trainer.precision_plugin.convert_input(copied(batch))
            batch = _transfer_hook_owner(trainer, module).on_before_batch_transfer(batch, 0)
            return trainer.strategy.batch_to_device(batch, dataloader_idx=0)
    finally:
        trainer.training = True


def _transfer_hook_owner(trainer: L.Trainer, module: Any) -> Any:
    """Returns the data module where it overrides the hook, else the module, as the Trainer does."""
    owner = data_module(trainer)
    hook = None if owner is None else type(owner).on_before_batch_transfer
    return module if hook is None or hook.__module__.split(".")[0] in ("lightning", "pytorch_lightning") else owner


def data_module(trainer: L.Trainer) -> Any:
    """Returns the LightningDataModule in use, if any."""
    return getattr(trainer, "datamodule", None)


def _own_seed(trainer: L.Trainer, seed: int) -> int:
    """Returns a seed for each process, since masks for other examples are other masks."""
    return seed + PROCESS_STRIDE * trainer.global_rank


@contextmanager
def _no_context() -> Iterator[None]:
    yield


def _ignore(*args: Any, **kwargs: Any) -> None:
    """Stands for `self.log` while nothing may be logged."""
