"""Evaluating a module's losses inside a training run without side effects."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import lightning as L
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_ifthpo.core.autodiff import without_hooks
from lightning_ifthpo.core.module_state import ModuleState
from lightning_ifthpo.core.random_state import Stream, derive_seed, isolated
from lightning_ifthpo.core.side_effects import restored
from lightning_ifthpo.runtime.silence import do_nothing, silenced
from lightning_ifthpo.training_loss import is_stub


@contextmanager
def undisturbed(trainer: L.Trainer, module: L.LightningModule, seed: int, step: int = 0) -> Iterator[ModuleState]:
    """Undoes changes to the module (see `ModuleState`) and to the random state, and discards what is logged.

    Gives the module's state at the beginning of the block. The random numbers depend on seed, step and process. A
    resumed run draws the same ones again.
    """
    with ExitStack() as stack:
        own_seed = derive_seed(Stream.LOSSES, seed=seed, step=step, rank=trainer.global_rank)
        stack.enter_context(isolated(module.device, own_seed))
        stack.enter_context(_mute(trainer, module))
        stack.enter_context(without_hooks([*module.parameters(), *module.modules()]))
        yield stack.enter_context(restored(module))


@contextmanager
def differentiable_kernels(module: nn.Module, *, twice: bool) -> Iterator[None]:
    """Chooses kernels with a derivative also in eval mode, which cuDNN's recurrence lacks, and with a second one.

    A second derivative is what fused attention lacks; `twice` says whether it is needed.
    """
    recurrent = any(isinstance(submodule, nn.RNNBase) for submodule in module.modules())
    without_cudnn = torch.backends.cudnn.flags(enabled=False) if recurrent else nullcontext()
    with sdpa_kernel(SDPBackend.MATH) if twice else nullcontext(), without_cudnn:
        yield


@contextmanager
def _mute(trainer: L.Trainer, module: L.LightningModule) -> Iterator[None]:
    """Lets loggers, and `log` and `log_dict` of the module, do nothing inside the block."""
    with ExitStack() as stack:
        stack.callback(setattr, trainer, "loggers", trainer.loggers)
        trainer.loggers = [silenced(logger) for logger in trainer.loggers]
        for name in ("log", "log_dict"):
            # Lightning's own class, `lightning` or `pytorch_lightning`
            owner: Any = next(kind for kind in type(module).__mro__ if is_stub(vars(kind).get(name, is_stub)))
            stack.callback(setattr, owner, name, vars(owner)[name])
            own = vars(module)
            stack.callback(*((own.__setitem__, name, own[name]) if name in own else (own.pop, name)))
            setattr(owner, name, do_nothing)
            own[name] = do_nothing
        yield
