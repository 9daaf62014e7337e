"""The losses of a module during a fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, TypeAlias

import lightning as L
import torch
from torch import Tensor, nn

from lightning_ifthpo.core.autodiff import gradients_on
from lightning_ifthpo.core.loss import Loss
from lightning_ifthpo.core.module_state import ModuleState
from lightning_ifthpo.module import BilevelLightningModule
from lightning_ifthpo.runtime.batches import copied
from lightning_ifthpo.runtime.distributed import Ranks
from lightning_ifthpo.runtime.isolation import differentiable_kernels, undisturbed
from lightning_ifthpo.runtime.precision import CurvaturePrecision, has_half_weights, is_autocast, precision_of
from lightning_ifthpo.runtime.sharding import unsharded
from lightning_ifthpo.runtime.telling import rank_zero_warn
from lightning_ifthpo.training_loss import training_loss

BY_DIFFERENCES = ("finite_difference", "three_point")  # differences of gradients; of losses

_Condition: TypeAlias = Callable[[nn.Module], bool]
"""Whether a submodule is evaluated in the mode of training; in eval mode otherwise."""


class ModuleLosses:
    """A module's losses on batches, as `Loss` objects that know this process's share.

    Evaluate and differentiate losses inside a `session`. The inner loss is evaluated in the train/eval modes in which
    the session found the module, the outer loss in eval mode. A mode lasts until the next evaluation, because
    activation checkpointing repeats the forward pass during the backward pass.

    Args:
        module: The module, with an inner loss or a training step, and with `outer_loss` if that is evaluated.
        ranks: The processes among which batches are split; None if they are not split.
        precision: "32" evaluates without autocast; "inherit" as training does. A module that needs autocast, because it
            mixes half and full precision, is evaluated under autocast in any case.

    Attributes:
        is_verified: Whether the second derivatives of the inner loss are known to be right.
        forward_mode: Whether its derivatives in forward mode are known to be right, and cheaper.
        difference_factor: How much shorter than usual the steps of differences are; None before it is known.
    """

    def __init__(
        self, trainer: L.Trainer, module: Any, ranks: Ranks | None, precision: CurvaturePrecision = "32"
    ) -> None:
        self._trainer = trainer
        self._module = module
        self._ranks = ranks
        self._modes: dict[nn.Module, bool] = {}
        self._state: ModuleState | None = None
        self._leaves_out_autocast = "mixed" in precision_of(trainer) and not is_autocast(trainer, precision)
        self.is_verified = self.forward_mode = False
        self.difference_factor: float | None = None

    @property
    def has_low_precision(self) -> bool:
        """Whether weights or losses are in half precision, so that differences of them are lost in rounding."""
        autocasts = "mixed" in precision_of(self._trainer) and not self._leaves_out_autocast
        return autocasts or has_half_weights(self._trainer)

    @contextmanager
    def session(self, curvature: str, *, seed: int = 0, step: int = 0) -> Iterator[None]:
        """Allows losses to be evaluated and differentiated inside the block; see `undisturbed` for seed and step.

        The curvature decides whether kernels with a second derivative are needed.
        """
        with ExitStack() as stack:
            stack.enter_context(unsharded(self._module))
            self._state = stack.enter_context(undisturbed(self._trainer, self._module, seed, step))
            stack.callback(setattr, self, "_state", None)
            stack.enter_context(gradients_on())
            if curvature != "three_point":  # compiled graphs cannot be differentiated twice, nor kept
                stack.enter_context(torch.compiler.set_stance("force_eager"))
                twice = curvature not in BY_DIFFERENCES
                stack.enter_context(differentiable_kernels(self._module, twice=twice))
            self._modes = {submodule: submodule.training for submodule in self._module.modules()}
            yield

    def inner(self, batch: Any, *, scale: float = 1.0) -> Loss:
        """Returns the inner loss on a batch."""
        return self._loss("inner_loss", partial(training_loss, self._module), _any, batch, scale)

    def outer(self, batch: Any, *, scale: float = 1.0) -> Loss:
        """Returns the outer loss on a batch."""
        return self._loss("outer_loss", self._module.outer_loss, _none, batch, scale)

    def outer_by_batch_statistics(self, batch: Any) -> Loss:
        """Returns the outer loss with BatchNorm, and all modules that have buffers, in the modes of training."""
        return self._loss("outer_loss", self._module.outer_loss, _has_buffers, batch)

    def _loss(
        self, name: str, function: Callable[[Any], Tensor], trains: _Condition, batch: Any, scale: float = 1.0
    ) -> Loss:
        return Loss(
            partial(self._evaluate, function, trains, batch),
            trainable(self._module),
            name=name,
            share=1.0 if self._ranks is None else self._ranks.share_of(batch),
            all_reduce=None if self._ranks is None else self._ranks.sum_over_ranks,
            is_verified=self.is_verified,
            forward_mode=self.forward_mode,
            difference_factor=self.difference_factor or 1.0,
            scale=scale,
        )

    def _evaluate(self, loss: Callable[[Any], Tensor], trains: _Condition, batch: Any) -> Tensor:
        try:
            return self._evaluate_once(loss, trains, batch)
        except RuntimeError as error:
            # torch's words are "same dtype", "scalar type", "bias type" and the like
            if not self._leaves_out_autocast or "type" not in str(error):
                raise
            reason = str(error).splitlines()[0]
        self._leaves_out_autocast = False
        try:
            value = self._evaluate_once(loss, trains, batch)
        except RuntimeError:
            self._leaves_out_autocast = True
            raise
        rank_zero_warn(
            "losses are differentiated under autocast, in the precision of training, because they fail in float32: "
            f"{reason}"
        )
        return value

    def _evaluate_once(self, loss: Callable[[Any], Tensor], trains: _Condition, batch: Any) -> Tensor:
        assert self._state is not None, "evaluate a loss inside a session"
        with self._state.evaluation():
            for submodule, mode in self._modes.items():
                submodule.training = mode and trains(submodule)
            with nullcontext() if self._leaves_out_autocast else self._trainer.precision_plugin.forward_context():
                return loss(copied(batch))


def trainable(module: Any) -> list[nn.Parameter]:
    """Returns the weights of a module that require a gradient, without hyperparameters."""
    parameters = module.inner_parameters() if isinstance(module, BilevelLightningModule) else module.parameters()
    return [parameter for parameter in parameters if parameter.requires_grad]


def _any(module: nn.Module) -> bool:
    return True


def _none(module: nn.Module) -> bool:
    return False


def _has_buffers(module: nn.Module) -> bool:
    return any(True for _ in module.buffers(recurse=False))
