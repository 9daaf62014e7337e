"""A module's losses as functions of a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Literal, TypeAlias

import lightning as L
from torch import Tensor

from lightning_ifthpo.core.autodiff import gradients_on
from lightning_ifthpo.module import training_loss
from lightning_ifthpo.runtime.batches import copied
from lightning_ifthpo.runtime.isolation import twice_differentiable, undisturbed
from lightning_ifthpo.runtime.sharding import unsharded

CurvaturePrecision: TypeAlias = Literal["32", "inherit"]
BY_DIFFERENCES = ("finite_difference", "three_point")  # of gradients or of losses


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


@contextmanager
def _no_context() -> Iterator[None]:
    yield
