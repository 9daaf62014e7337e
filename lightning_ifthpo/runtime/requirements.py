"""Checks before the first batch; their errors say what to do."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import StochasticWeightAveraging
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy

from lightning_ifthpo.module import BilevelLightningModule
from lightning_ifthpo.optimizers import is_known
from lightning_ifthpo.runtime.distributed import is_gathered, is_replicated
from lightning_ifthpo.runtime.losses import BY_DIFFERENCES, trainable
from lightning_ifthpo.runtime.precision import CurvaturePrecision, has_half_weights, is_autocast, precision_of
from lightning_ifthpo.runtime.telling import rank_zero_warn
from lightning_ifthpo.training_loss import has_inner_loss, has_training_step


def check_module(trainer: L.Trainer, module: Any, trainable_before: Collection[str]) -> None:
    """Raises TypeError or ValueError unless implicit differentiation can tune the module in this Trainer."""
    name = type(module).__name__
    check_bilevel(module, "IFTHypergradient")
    check_strategy(trainer, "IFTHypergradient", gathers=True)
    if not any(True for _ in module.hyperparameters()):  # any(module.hyperparameters()) would test their values
        raise ValueError(
            f"{name} has no hyperparameters; call self.register_hyperparameter(name, tensor_or_module) in its __init__"
        )
    spread = [path for path, tensor in module.named_hyperparameters() if isinstance(tensor, DTensor)]
    if spread:
        raise ValueError(
            f"hyperparameter {spread[0]!r} is spread over processes; apply fully_shard to the modules that hold "
            "weights, not to the one that holds hyperparameters"
        )
    if type(module).outer_loss is BilevelLightningModule.outer_loss:
        raise ValueError(f"{name} has no outer_loss(batch): define what the hyperparameters minimize")
    if not has_inner_loss(module) and not has_training_step(module):
        raise ValueError(f"{name} has neither inner_loss(batch) nor training_step: define what the weights minimize")
    check_repeatable(module)
    names = {id(tensor): path for path, tensor in module.named_hyperparameters() if path in trainable_before}
    _check_optimizers(trainer, module, names)


def check_bilevel(module: Any, callback: str) -> None:
    """Raises TypeError unless a module has the bilevel mixin."""
    if not isinstance(module, BilevelLightningModule):
        name = type(module).__name__
        raise TypeError(
            f"{callback} needs a BilevelLightningModule, got {name}; add the mixin: "
            f"class {name}(BilevelLightningModule, LightningModule)"
        )


def check_strategy(trainer: L.Trainer, callback: str, *, gathers: bool = False) -> None:
    """Raises ValueError if the Trainer spreads the model over devices and the callback cannot gather it."""
    if trainer.world_size == 1 or is_replicated(trainer.strategy) or (gathers and is_gathered(trainer.strategy)):
        return
    others = ", or ModelParallelStrategy(tensor_parallel_size=1) with fully_shard" if gathers else ""
    raise ValueError(
        f"{callback} needs the whole model on each device, and {type(trainer.strategy).__name__} is not known to keep "
        f"it there; use strategy='ddp'{others}"
    )


def check_observed(trainer: L.Trainer, module: Any, top_k: int) -> None:
    """Raises ValueError unless `top_k` eigenvalues of the module's loss can be measured in this Trainer."""
    check_strategy(trainer, "SharpnessMonitor", gathers=True)
    name = type(module).__name__
    weights = trainable(module)
    if not weights:
        raise ValueError(f"{name} has no trainable parameters, and so no curvature to measure; unfreeze some")
    size = math.inf if any(map(is_lazy, weights)) else sum(weight.numel() for weight in weights)
    if top_k > size:
        raise ValueError(f"top_k={top_k} eigenvalues are asked for, and {name} has {size} weights; lower top_k")
    check_real_weights(module, weights)
    check_repeatable(module)


def check_real_weights(module: Any, weights: Iterable[Tensor]) -> None:
    """Raises ValueError if some of a module's weights are complex."""
    if any(weight.is_complex() for weight in weights):
        raise ValueError(f"{type(module).__name__} has complex weights; only real ones are supported")


def check_repeatable(module: Any) -> None:
    """Raises ValueError if evaluating a module's training loss would train it."""
    if not module.automatic_optimization and not has_inner_loss(module):
        raise ValueError(
            f"{type(module).__name__} optimizes manually, so its training_step cannot be evaluated without training; "
            "define inner_loss(batch): what the weights minimize"
        )


def check_precision(trainer: L.Trainer, curvature: str, precision: CurvaturePrecision = "32") -> None:
    """Raises ValueError in half precision for kfac, and for finite differences, lost in rounding there."""
    needs_float32 = (*BY_DIFFERENCES, "kfac")  # kfac decomposes matrices
    if curvature in needs_float32 and (has_half_weights(trainer) or is_autocast(trainer, precision)):
        raise ValueError(
            f"curvature={curvature!r} needs float32, and the Trainer's precision is {precision_of(trainer)!r}; use "
            "curvature='hessian', or a mixed precision with precision='32' in the callback"
        )


def check_rate_is_free(trainer: Any, module: L.LightningModule) -> None:
    """Raises ValueError for a Trainer or a module whose learning rate ExactGeN cannot choose."""
    check_strategy(trainer, "ExactGeN")
    if not module.automatic_optimization:
        raise ValueError(
            f"{type(module).__name__} optimizes manually, and ExactGeN needs the Trainer to make the steps; use "
            "ExactGeNLR in training_step"
        )
    optimizers = [optimizer for optimizer in trainer.optimizers if optimizer.param_groups]
    if len(optimizers) != 1:
        raise ValueError(
            f"ExactGeN chooses the rate of one optimizer, and there are {len(optimizers)}; return one from "
            "configure_optimizers"
        )
    check_real_weights(module, module.parameters())
    if any(isinstance(callback, StochasticWeightAveraging) for callback in trainer.callbacks):
        raise ValueError("StochasticWeightAveraging sets its own learning rates; use it or ExactGeN, not both")


def check_brings_back(trainer: L.Trainer, name: str) -> None:
    """Raises ValueError if the Trainer trains in processes that take their results with them when they end."""
    launcher = type(trainer.strategy.launcher)
    if any(kind.__name__ == "_MultiProcessingLauncher" for kind in launcher.__mro__):  # by name, as in `is_replicated`
        raise ValueError(
            f"{name} cannot bring its result back from the processes that {type(trainer.strategy).__name__} spawns; "
            "use strategy='ddp' in a script, or one device"
        )


def _check_optimizers(trainer: L.Trainer, module: Any, trainable_before: dict[int, str]) -> None:
    for optimizer in trainer.optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if (name := trainable_before.get(id(parameter))) is not None:
                    raise ValueError(
                        f"hyperparameter {name!r} requires a gradient and is also in the optimizer built by "
                        "configure_optimizers, which would train it on the inner loss; build it from "
                        "self.inner_parameters(), or leave the hyperparameter frozen"
                    )
            _ask_modules(module, float(group["lr"]))
            if group.get("maximize"):
                raise ValueError("the inner optimizer maximizes; use maximize=False and the negative inner loss")
        if not is_known(optimizer):
            rank_zero_warn(
                f"the update rule of {type(optimizer).__name__} is not known; Amortized and damping='horizon' treat it "
                "as gradient descent with its learning rate, and ignore its weight decay"
            )


def _ask_modules(module: Any, lr: float) -> None:
    """Calls `check_training(parameters, lr)` of registered modules that have it, and adds their names to its errors."""
    parameters = list(module.parameters())
    for name, submodule in hyperparameter_modules(module):
        if hasattr(submodule, "check_training"):
            try:
                submodule.check_training(parameters, lr)
            except ValueError as error:
                raise ValueError(f"hyperparameter {name!r}: {error}") from error


def hyperparameter_modules(module: Any) -> Iterator[tuple[str, Any]]:
    """Yields path and module for each registered module, and for the modules inside it."""
    for registered in dict.fromkeys(path.split(".")[0] for path, _ in module.named_hyperparameters()):
        value = getattr(module, registered)
        if isinstance(value, nn.Module):
            yield from value.named_modules(prefix=registered)
