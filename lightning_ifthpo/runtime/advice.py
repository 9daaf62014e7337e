"""Mistakes with which training goes on: what to tell people about them."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from lightning_ifthpo.hyperparameters import IndexedDataset
from lightning_ifthpo.hyperparameters.per_example import PerExample
from lightning_ifthpo.runtime.outer_data import draws_all
from lightning_ifthpo.runtime.requirements import hyperparameter_modules
from lightning_ifthpo.runtime.telling import rank_zero_warn

_FEW = 10  # hyper steps
_MANY = 10_000_000  # examples, for which a comparison takes seconds


def examine_data(trainer: L.Trainer, module: Any, outer: Iterable[Any]) -> str:
    """Looks at training and outer data together, see `check_examples`; returns `warn_of_shared_examples`."""
    check_examples(trainer, module)
    return warn_of_shared_examples(trainer, outer)


def check_examples(trainer: L.Trainer, module: Any) -> None:
    """Compares hyperparameters with a row for each training example with the training set, where it has indices.

    Raises:
        ValueError: If there are fewer rows than examples; more of them are told by a warning.
    """
    data = getattr(trainer.train_dataloader, "dataset", None)
    while isinstance(data, Subset):
        data = data.dataset
    if not isinstance(data, IndexedDataset):
        return
    for name, part in hyperparameter_modules(module):
        if isinstance(part, PerExample) and part.examples != len(data):
            kind = type(part).__name__
            told = (
                f"hyperparameter {name!r} is a {kind} for {part.examples} examples, and the IndexedDataset of the "
                f"training set has {len(data)}, so that its rows are not those of the training examples. Wrap the "
                f"training set after it was split, train = IndexedDataset(part), and create {kind} for len(train) "
                "examples"
            )
            if part.examples < len(data):
                raise ValueError(told)
            rank_zero_warn(told)


def warn_of_shared_examples(trainer: L.Trainer, outer: Iterable[Any]) -> str:
    """Warns if outer examples are training examples, too, as far as data sets and samplers show it.

    Returns:
        How many they are, as "8 of 20"; empty if none is that shows.
    """
    training: Any = trainer.train_dataloader
    if not all(
        isinstance(loader, DataLoader) and draws_all(loader, trainer.world_size) for loader in (training, outer)
    ):
        return ""
    assert isinstance(outer, DataLoader)
    shared, total = _shared_examples(training.dataset, outer.dataset), len(outer.dataset)  # type: ignore[arg-type]
    if not shared:
        return ""
    rank_zero_warn(
        f"IFTHypergradient: {shared} of {total} outer examples are training examples, too. On them the hyperparameters "
        "learn what helps to fit the training data, such as less weight decay; take outer data that training does not "
        "see, unless both losses are meant for the same data, as in a game"
    )
    return f"{shared} of {total}"


def _shared_examples(data: Any, other: Any) -> int:
    """Returns how many examples of one data set two subsets share; 0 if that is unknown, or takes long to find out."""
    if _root(data) is not _root(other) or len(data) + len(other) > _MANY:
        return 0
    with suppress(TypeError, IndexError, KeyError):  # keys that are no indices
        indices = set(_indices(other))
        return sum(index in indices for index in _indices(data))
    return 0


def _root(data: Any) -> Any:
    """Returns the data set behind subsets and added indices."""
    return _root(data.dataset) if isinstance(data, (IndexedDataset, Subset)) else data


def _indices(data: Any) -> Sequence[int]:
    """Returns which examples of its root a data set has."""
    if isinstance(data, IndexedDataset):
        return _indices(data.dataset)
    if isinstance(data, Subset):
        indices, own = _indices(data.dataset), data.indices
        return [indices[index] for index in (own.tolist() if isinstance(own, Tensor) else own)]
    return range(len(data))


def tell_of_few_steps(trainer: L.Trainer, every_n_batches: int, start_after_batches: int) -> None:
    """Says how many hyper steps the run will have, if they are too few to move anything."""
    batches = float(trainer.estimated_stepping_batches) * trainer.accumulate_grad_batches
    if not (0.0 <= batches < math.inf) or trainer.fast_dev_run:  # type: ignore[attr-defined]
        return
    steps = max(0, int(batches - start_after_batches)) // every_n_batches
    if steps < _FEW:
        count = {0: "no hyper step", 1: "one hyper step"}.get(steps, f"{steps} hyper steps")
        rank_zero_info(
            f"IFTHypergradient: this run of {batches:.0f} training batches has {count}, which moves the "
            "hyperparameters hardly at all; train longer, or lower every_n_batches or start_after_batches"
        )


def warn_of_no_step(every_n_batches: int, start_after_batches: int) -> None:
    """Warns at the end of a run without a hyper step."""
    rank_zero_warn(
        "IFTHypergradient made no hyper step, so that the hyperparameters are as they were: no batch with a loss came "
        f"{every_n_batches} training batches after the first {start_after_batches} (every_n_batches, "
        "start_after_batches)"
    )


def warn_of_long_step(step: int, excess: float) -> None:
    """Warns of a step of the hyper-optimizer that was replaced, and would have been so many units long."""
    rank_zero_warn(
        f"hyper step {step}: the hyper-optimizer would have moved the hyperparameters by {excess:.2g} "
        "units at once (1 is a factor of e, for a decay), which weights cannot follow. A step of the default "
        "optimizer was made instead; further ones are counted in summary(). Lower its learning rate, or leave "
        "out configure_hyper_optimizer"
    )


def warn_of_equal_hypergradients(paths: Iterable[str]) -> None:
    """Warns of hyperparameters whose entries all have the same hypergradient at the first hyper step."""
    for path in paths:
        rank_zero_warn(
            f"all entries of hyperparameter {path!r} that have a hypergradient have the same one, so that they act as "
            "a single number. If they belong to training examples, multiply the loss of each example by its entry "
            "before the mean: cross_entropy(..., reduction='none')"
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
