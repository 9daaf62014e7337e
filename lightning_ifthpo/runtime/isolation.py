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

from lightning_ifthpo.core.random_state import Stream, derive_seed, isolated
from lightning_ifthpo.runtime.snapshot import restored


@contextmanager
def undisturbed(trainer: L.Trainer, module: L.LightningModule, seed: int, step: int = 0) -> Iterator[None]:
    """Undoes the side effects that evaluations of the module's losses inside the block have.

    These are changes to the module (see `restored`), logged values, and the random state. Gradients are not touched as
    long as `torch.autograd.grad` is used.

    Args:
        trainer: The Trainer.
        module: The module.
        seed: Seed of the random numbers inside the block; each process draws its own masks for its own examples.
        step: Step of the caller, so that each step draws other numbers, the same ones after resuming.
    """
    with ExitStack() as stack:
        own_seed = derive_seed(Stream.LOSSES, seed=seed, step=step, rank=trainer.global_rank)
        stack.enter_context(isolated(module.device, own_seed))
        stack.enter_context(restored(module))
        stack.callback(setattr, trainer, "loggers", trainer.loggers)
        trainer.loggers = [DummyLogger()]  # accepts all calls, as under fast_dev_run
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


def _ignore(*args: Any, **kwargs: Any) -> None:
    """Replaces `self.log` while nothing may be logged."""
