"""Evaluating a module's losses inside a training run without side effects."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_ifthpo.core.random_state import PROCESS_STRIDE, isolated
from lightning_ifthpo.runtime.snapshot import restored


@contextmanager
def undisturbed(trainer: L.Trainer, module: L.LightningModule, seed: int) -> Iterator[None]:
    """Puts back all that an evaluation of the module's losses inside the block may leave behind.

    That is what `restored` puts back of the module, what is logged, and the random state, which is seeded inside the
    block so that each evaluation draws the same numbers wherever a run was resumed. Gradients need no care as long as
    `torch.autograd.grad` is used.
    """
    with ExitStack() as stack:
        stack.enter_context(isolated(module.device, own_seed(trainer, seed)))
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


def own_seed(trainer: L.Trainer, seed: int) -> int:
    """Returns a seed for each process, since masks for other examples are other masks."""
    return seed + PROCESS_STRIDE * trainer.global_rank


def _ignore(*args: Any, **kwargs: Any) -> None:
    """Stands for `self.log` while nothing may be logged."""
