"""Evaluating a module's losses inside a training run without side effects."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext

import lightning as L
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_ifthpo.core.random_state import Stream, derive_seed, isolated
from lightning_ifthpo.runtime.snapshot import restored


@contextmanager
def undisturbed(trainer: L.Trainer, module: L.LightningModule, seed: int, step: int = 0) -> Iterator[None]:
    """Undoes changes to the module inside the block (see `restored`) and to the random state; discards logged values.

    Use `torch.autograd.grad` inside it: `backward` would change gradients. The random numbers depend on seed, step and
    process. A resumed run draws the same ones again.
    """
    with ExitStack() as stack:
        own_seed = derive_seed(Stream.LOSSES, seed=seed, step=step, rank=trainer.global_rank)
        stack.enter_context(isolated(module.device, own_seed))
        stack.enter_context(restored(module))
        stack.callback(setattr, trainer, "loggers", trainer.loggers)
        trainer.loggers = [DummyLogger()]  # accepts all calls, as under fast_dev_run
        vars(module).update(dict.fromkeys(("log", "log_dict"), lambda *_, **__: None))
        yield


@contextmanager
def twice_differentiable(module: nn.Module) -> Iterator[None]:
    """Chooses kernels with a second derivative: no compiled graphs, no fused attention, no cuDNN recurrence."""
    recurrent = any(isinstance(submodule, nn.RNNBase) for submodule in module.modules())
    without_cudnn = torch.backends.cudnn.flags(enabled=False) if recurrent else nullcontext()
    with torch.compiler.set_stance("force_eager"), sdpa_kernel(SDPBackend.MATH), without_cudnn:
        yield
