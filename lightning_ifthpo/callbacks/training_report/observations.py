"""What a Trainer, a module and the other callbacks say of a run. Nothing is changed or computed on a device."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import lightning as L
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.data import RandomSampler, SequentialSampler

from lightning_ifthpo.callbacks.hypergradient import IFTHypergradient
from lightning_ifthpo.callbacks.periodic import PeriodicCallback
from lightning_ifthpo.callbacks.sharpness import SharpnessMonitor
from lightning_ifthpo.callbacks.summary import remarks
from lightning_ifthpo.callbacks.training_report.facts import Bound, Tuning
from lightning_ifthpo.callbacks.training_report.records import Records
from lightning_ifthpo.hyperparameters.bounded import Bounded
from lightning_ifthpo.module import BilevelLightningModule
from lightning_ifthpo.solvers import Amortized

_GROUPS = 8  # parameter groups whose learning rate is recorded
_VALIDATION = ("val", "valid", "validation", "held_out", "dev")


def learning_rates(trainer: L.Trainer) -> Iterator[tuple[str, float]]:
    """Yields a name and the rate of each parameter group, of the first eight."""
    optimizers = trainer.optimizers
    for index, optimizer in enumerate(optimizers):
        for number, group in enumerate(optimizer.param_groups[:_GROUPS]):
            prefix = f"optimizer {index}, " if len(optimizers) > 1 else ""
            yield f"lr/{prefix}group {number}", float(group["lr"])


def own_metrics(trainer: Any) -> Iterator[tuple[str, float]]:
    """Yields name and value of each metric of the package's callbacks."""
    prefixes = ("hypergrad/", "hyperparameter/", "gen/", *(f"{monitor.name}/" for monitor in monitors(trainer)))
    for name, value in trainer.callback_metrics.items():
        if name.startswith(prefixes):
            yield name, float(value)


def validation_losses(trainer: L.Trainer) -> Iterator[tuple[str, float]]:
    """Yields name and value of each loss that validation has logged, as far as names show it."""
    for name, value in trainer.callback_metrics.items():
        is_loss = ("loss" in name and name.startswith(_VALIDATION)) or name == "outer_loss"
        if is_loss and value.numel() == 1:
            yield name, float(value)


def monitors(trainer: Any) -> list[SharpnessMonitor]:
    """Returns the monitors of curvature."""
    return [callback for callback in trainer.callbacks if isinstance(callback, SharpnessMonitor)]


def shares_of_time(trainer: Any) -> dict[str, float]:
    """Returns the share of the training time of each callback that measures it."""
    found: dict[str, float] = {}
    for callback in trainer.callbacks:
        if isinstance(callback, PeriodicCallback):
            name = type(callback).__name__
            found[f"{name} {len(found) + 1}" if name in found else name] = callback.share_of_time
    return found


def tuner(trainer: Any) -> IFTHypergradient | None:
    """Returns the callback that makes hyper steps; the first of several."""
    return next((callback for callback in trainer.callbacks if isinstance(callback, IFTHypergradient)), None)


def hyper_steps(callback: IFTHypergradient | None) -> tuple[int, float, float] | None:
    """Returns the number of hyper steps, and the decrease that they have predicted and confirmed."""
    if callback is None or callback.stepper is None:
        return None
    evidence = callback.stepper.evidence
    return callback.stepper.steps, evidence.predicted, evidence.confirmed


def tuning_of(trainer: Any, module: Any, records: Records, shared: str) -> Tuning | None:
    """Returns what hyper steps have done so far: from the running callback, or else from its summary.

    Args:
        trainer: The Trainer.
        module: Its module.
        records: Curves that have been recorded.
        shared: How many outer examples are training examples, as "8 of 20", or "".

    Returns:
        None without the callback, and before its first batch.
    """
    callback = tuner(trainer)
    if callback is None:
        return None
    summary, stepper = callback.latest_summary, callback.stepper
    bounds, is_amortized = tuple(_bounds(module, records)), isinstance(callback.solver, Amortized)
    if summary is not None:
        return Tuning(
            hyper_steps=summary.hyper_steps,
            is_amortized=is_amortized,
            made=summary.hyper_steps - sum(summary.skipped.values()),
            predicted=summary.predicted,
            confirmed=summary.confirmed,
            error=summary.error,
            travel=math.nan if stepper is None else stepper.evidence.travel,
            replaced=summary.replaced,
            skipped=dict(summary.skipped),
            bounds=bounds,
            remarks=summary.advice,
            shared=shared,
            held_out=summary.held_out_loss,
            outer=summary.outer_loss,
            curvature=summary.curvature,
            verdict=f"Verdict: {summary.verdict}. {summary.reason}",
        )
    if stepper is None:
        return None
    evidence = stepper.evidence
    return Tuning(
        hyper_steps=stepper.steps,
        is_amortized=is_amortized,
        made=evidence.steps,
        predicted=evidence.predicted,
        confirmed=evidence.confirmed,
        error=evidence.error,
        travel=evidence.travel,
        replaced=stepper.replaced,
        skipped=callback.skipped_by_cause,
        bounds=bounds,
        remarks=remarks(module, evidence),
        shared=shared,
        curvature=stepper.curvature,
    )


def shared_examples(trainer: L.Trainer) -> str:
    """Returns how many outer examples are training examples, too, as "8 of 20"; empty if there are none."""
    callback = tuner(trainer)
    return "" if callback is None else callback.shared_examples


def untuned_hyperparameters(module: Any) -> tuple[str, ...]:
    """Returns the names of the hyperparameters, if nothing tunes them."""
    if not isinstance(module, BilevelLightningModule) or not module.is_left_untuned:
        return ()
    return tuple(dict.fromkeys(path.split(".")[0] for path, _ in module.named_hyperparameters()))


def is_shuffled(trainer: Any) -> bool | None:
    """Returns whether the training loader draws in random order; None if that is unknown."""
    sampler = getattr(trainer.train_dataloader, "sampler", None)
    if isinstance(sampler, RandomSampler):
        return True
    return False if isinstance(sampler, SequentialSampler) else getattr(sampler, "shuffle", None)


def layers_in_training_mode(module: nn.Module) -> tuple[str, ...]:
    """Returns the names of BatchNorm and dropout layers that are in training mode."""
    return tuple(name for name, layer in _layers_with_modes(module) if layer.training)


def layers_in_evaluation_mode(trainer: L.Trainer, module: nn.Module) -> tuple[str, ...]:
    """Returns the names of BatchNorm and dropout layers that are in evaluation mode, in parts that train.

    A BatchNorm layer whose own weights do not train is frozen on purpose, and so is all that is in a frozen body.
    """
    layers = {name: layer for name, layer in _layers_with_modes(module) if not layer.training}
    parts = _parts_that_train(trainer, module) if layers else set()
    has_weights = {name: next(layer.parameters(), None) is not None for name, layer in layers.items()}
    return tuple(name for name in layers if (name if has_weights[name] else _owner(name)) in parts)


def frozen_layers(trainer: L.Trainer, module: nn.Module) -> tuple[str, ...]:
    """Returns the frozen weights of single layers that come behind weights that train, in a part that trains.

    Layers in front, whole bodies, target networks, constants and BatchNorm layers are frozen on purpose, as a rule.
    """
    parts, found, behind = _parts_that_train(trainer, module), [], False
    for name, weight in weights_of(module).items():
        layer, owner = module.get_submodule(_owner(name)), _owner(name)
        is_layer = not any(layer.children()) and not isinstance(layer, _BatchNorm)
        behind = behind or weight.requires_grad
        if behind and is_layer and owner not in parts and _owner(owner) in parts and not weight.requires_grad:
            found.append(name)
    return tuple(found)


def watched_weights(trainer: L.Trainer, module: Any) -> list[tuple[str, nn.Parameter]]:
    """Returns names and weights that require gradients, if an optimizer has them or they get a gradient.

    What is left out are copies, such as a target network or the mean of the weights.
    """
    trained = _trained_ids(trainer)
    return [
        (name, weight)
        for name, weight in weights_of(module).items()
        if weight.requires_grad and (id(weight) in trained or weight.grad is not None)
    ]


def _trained_ids(trainer: L.Trainer) -> set[int]:
    """Returns the ids of the weights that optimizers have, and that require gradients."""
    groups = (group for optimizer in trainer.optimizers for group in optimizer.param_groups)
    return {id(weight) for group in groups for weight in group["params"] if weight.requires_grad}


def _layers_with_modes(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, layer in module.named_modules():
        if name and isinstance(layer, (_BatchNorm, _DropoutNd)):
            yield name, layer


def _parts_that_train(trainer: L.Trainer, module: nn.Module) -> set[str]:
    """Returns the names of all submodules, "" for the module itself, that have a weight in an optimizer."""
    trained, parts = _trained_ids(trainer), set()
    for name, weight in module.named_parameters():
        if id(weight) in trained:
            while name:
                name = _owner(name)
                parts.add(name)
    return parts


def _owner(name: str) -> str:
    """Returns the name of the submodule that a weight or a submodule belongs to."""
    return name.rpartition(".")[0]


def weights_of(module: Any) -> dict[str, nn.Parameter]:
    """Returns the parameters of a module by name, without hyperparameters."""
    named = module.named_inner_parameters() if isinstance(module, BilevelLightningModule) else module.named_parameters()
    return dict(named)


def ids_of_units(module: nn.Module) -> frozenset[int]:
    """Returns the ids of weights that have a row for each unit of a layer."""
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return frozenset(id(layer.weight) for layer in module.modules() if isinstance(layer, kinds))


def _bounds(module: Any, records: Records) -> Iterator[Bound]:
    for name in records.names("hyperparameter/"):
        kind = getattr(module, name.split("/")[1], None) if name.endswith("/max") else None
        if isinstance(kind, Bounded) and kind.is_at_bound(value := records[name].last):
            yield Bound(name.split("/")[1], value, kind.maximum)
