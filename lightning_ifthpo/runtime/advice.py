"""Mistakes with which training goes on: what to tell people about them."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence, Sized
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn
from torch.utils.data import DataLoader, Subset

from lightning_ifthpo.hyperparameters import IndexedDataset

_FEW = 10  # hyper steps


def warn_of_shared_examples(trainer: L.Trainer, outer: Iterable[Any]) -> None:
    """Warns if outer examples are training examples, too, as far as the data sets show it."""
    training: Any = trainer.train_dataloader
    if not (isinstance(training, DataLoader) and isinstance(outer, DataLoader)):
        return
    (root, indices), (outer_root, outer_indices) = _origin(training.dataset), _origin(outer.dataset)
    if root is outer_root and (shared := len(set(indices) & set(outer_indices))):
        rank_zero_warn(
            f"{shared} of {len(outer_indices)} outer examples are training examples, too. On them the hyperparameters "
            "learn what helps to fit the training data, such as less weight decay; take outer data that training does "
            "not see, unless both losses are meant for the same data, as in a game"
        )


def _origin(data: Any) -> tuple[Any, Sequence[int]]:
    """Returns the data set behind subsets and added indices, and which of its examples are in use."""
    if isinstance(data, IndexedDataset):
        return _origin(data.dataset)
    if isinstance(data, Subset):
        root, indices = _origin(data.dataset)
        return root, [indices[index] for index in data.indices]
    return data, range(len(data)) if isinstance(data, Sized) else ()


def tell_of_few_steps(trainer: L.Trainer, every_n_batches: int, start_after_batches: int) -> None:
    """Says how many hyper steps the run will have, if they are too few to move anything."""
    batches = float(trainer.estimated_stepping_batches) * trainer.accumulate_grad_batches
    if not math.isfinite(batches):
        return
    steps = max(0, int(batches - start_after_batches)) // every_n_batches
    if steps < _FEW:
        count = {0: "no hyper step", 1: "one hyper step"}.get(steps, f"{steps} hyper steps")
        rank_zero_info(
            f"IFTHypergradient: this run of {batches:.0f} training batches has {count}, which moves the "
            "hyperparameters hardly at all; train longer, or lower every_n_batches or start_after_batches"
        )


def warn_of_direct_effects(module: Any, directly: Collection[str]) -> None:
    """Warns of ready-made hyperparameters of the training loss alone on which the outer loss depends by itself.

    Args:
        module: A LightningModule with the bilevel mixin.
        directly: Paths of the tensors on which the outer loss depends by itself.
    """
    for name in sorted({path.split(".")[0] for path in directly}):
        value = getattr(module, name)
        if isinstance(value, nn.Module) and getattr(value, "is_for_training_loss", False):
            kind = type(value).__name__
            rank_zero_warn(
                f"outer_loss depends on hyperparameter {name!r} by itself, not only through the weights: it contains "
                f"{kind}, which then changes to make this loss small, whatever it does to the weights. Leave it out of "
                "outer_loss"
            )
