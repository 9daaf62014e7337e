"""Batches as the Trainer would hand them over."""

import threading
from dataclasses import dataclass
from types import SimpleNamespace
from typing import NamedTuple

import lightning as L
import pytest
import torch
from torch import Tensor

from lightning_ifthpo.runtime.batches import copied, prepared
from tests.helpers.device import DEVICE
from tests.helpers.trainers import Classifier, during_training, loader


@dataclass
class Example:
    x: Tensor
    y: int


@pytest.mark.parametrize(
    ("make", "read"),
    [
        (lambda x: x, lambda batch: batch),
        (lambda x: {"x": [x], "name": "a"}, lambda batch: batch["x"][0]),
        (lambda x: Example(x, 3), lambda batch: batch.x),
    ],
    ids=["tensor", "dict", "dataclass"],
)
def test_a_copy_may_be_changed(make, read):
    x = torch.ones(2)
    batch = make(x)
    copy = copied(batch)
    read(copy).mul_(0.0)
    assert torch.equal(x, torch.ones(2))
    assert type(copy) is type(batch)


class Graph:
    """A batch of a class of its own."""

    def __init__(self, x):
        self.x, self.store = x, {"edges": [x.clone()]}


class Slotted:
    __slots__ = ("x",)

    def __init__(self, x):
        self.x = x


@dataclass(frozen=True)
class Frozen:
    x: Tensor


class Pair(NamedTuple):
    x: Tensor
    graph: Graph


@pytest.mark.parametrize(
    ("make", "read"),
    [
        (Graph, lambda batch: [batch.x, batch.store["edges"][0]]),
        (lambda x: [Graph(x), 3], lambda batch: [batch[0].x]),
        (Slotted, lambda batch: [batch.x]),
        (Frozen, lambda batch: [batch.x]),
        (lambda x: Pair(x, Graph(x)), lambda batch: [batch.x, batch.graph.x]),
        (lambda x: {"a": SimpleNamespace(x=x)}, lambda batch: [batch["a"].x]),
        (lambda x: [x.numpy()], lambda batch: [batch[0]]),
    ],
    ids=["object", "in a list", "slots", "frozen dataclass", "named tuple", "namespace", "NumPy"],
)
def test_batches_of_any_class_are_copied(make, read):
    x = torch.ones(2)
    batch = make(x)
    copy = copied(batch)
    for part in read(copy):
        part *= 0.0
    assert all(float(part.sum()) == 2.0 for part in read(batch))
    assert type(copy) is type(batch)


def test_what_cannot_be_copied_is_shared_and_the_rest_is_copied():
    lock = threading.Lock()
    assert copied([lock, torch.ones(1)])[0] is lock
    batch = Graph(torch.ones(2, requires_grad=True) * 1.0)  # a tensor with a graph, which deepcopy refuses
    batch.lock = lock
    copy = copied(batch)
    copy.x.data.zero_()
    assert batch.x.tolist() == [1.0, 1.0]
    assert copy.lock is lock


class Labelled(Tensor):
    """A tensor with an attribute."""


def test_attributes_of_tensors_are_kept():
    x = torch.ones(2).as_subclass(Labelled)
    x.y = torch.zeros(1)
    copy = copied([x])[0]
    copy.y.add_(1.0)
    assert (type(copy), x.y.item(), copy.y.item()) == (Labelled, 0.0, 1.0)


class Doubling(Classifier):
    """Knows whether it is being trained when a batch is transferred, and draws random numbers then."""

    def on_before_batch_transfer(self, batch, dataloader_idx):
        if isinstance(batch, list):  # of the Trainer itself
            return batch
        return batch * (3.0 if self.trainer.training else 2.0) + torch.rand(())


def test_a_batch_is_prepared_as_in_validation_and_draws_from_its_seed():
    def action(trainer, module):
        batch, before = torch.ones(2), torch.get_rng_state()
        first, again, other = (prepared(trainer, module, batch, seed) for seed in (1, 1, 2))
        assert bool(((first >= 2.0) & (first < 3.0)).all())
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
        assert torch.equal(batch, torch.ones(2))
        assert first.device.type == DEVICE.type
        assert trainer.training
        assert torch.equal(torch.get_rng_state(), before)

    during_training(action, Doubling)


def test_the_precision_of_the_trainer_converts_it():
    def action(trainer, module):
        assert prepared(trainer, module, torch.ones(2), 0).dtype == torch.float64

    during_training(action, precision="64-true")


class Data(L.LightningDataModule):
    def train_dataloader(self):
        return loader()

    def val_dataloader(self):
        return loader()


class Adding(Data):
    def on_before_batch_transfer(self, batch, dataloader_idx):
        return batch if isinstance(batch, list) else batch + 10.0


@pytest.mark.filterwarnings("ignore:You have overridden `on_before_batch_transfer` in")
@pytest.mark.parametrize(("make", "least", "most"), [(Adding, 11.0, 11.0), (Data, 2.0, 3.0)], ids=["its own", "none"])
def test_a_hook_of_the_data_module_comes_first(make, least, most):
    def action(trainer, module):
        assert least <= float(prepared(trainer, module, torch.ones(2), 0)[0]) <= most

    during_training(action, Doubling, datamodule=make())


def test_the_trainer_trains_again_after_an_error():
    class Failing(Classifier):
        def on_before_batch_transfer(self, batch, dataloader_idx):
            if not isinstance(batch, list):
                raise ArithmeticError
            return batch

    def action(trainer, module):
        with pytest.raises(ArithmeticError):
            prepared(trainer, module, torch.ones(2), 0)
        assert trainer.training

    during_training(action, Failing)
