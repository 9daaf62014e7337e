"""Mistakes with which training goes on."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset, random_split

from lightning_ifthpo import IFTHypergradient
from lightning_ifthpo.hyperparameters import IndexedDataset, LossWeights, WeightDecay
from tests.helpers.trainers import Classifier, classification_data, quiet_trainer


class On(Classifier):
    """Trains on a data set that the test chooses."""

    def __init__(self, data):
        super().__init__()
        self.data = data

    def train_dataloader(self):
        return DataLoader(self.data, batch_size=8)

    def inner_loss(self, batch):
        return super().inner_loss(batch[:2])


DATA = classification_data(32)
FIRST, LAST = random_split(DATA, [16, 16], generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("training", "outer", "shared"),
    [
        (DATA, DATA, 32),
        (DATA, FIRST, 16),
        (IndexedDataset(DATA), Subset(FIRST, range(3)), 3),
        (IndexedDataset(FIRST), LAST, 0),
        (Subset(DATA, range(20)), Subset(DATA, range(12, 32)), 8),
        (FIRST, TensorDataset(*DATA.tensors), 0),  # another object: nothing shows that it is the same
    ],
    ids=["all", "a part", "a part of a part", "apart", "overlapping", "unknown"],
)
def test_outer_examples_that_training_sees_are_told(training, outer, shared, recwarn):
    callback = IFTHypergradient(1, outer_dataloader=DataLoader(outer, batch_size=3))
    quiet_trainer(max_steps=2, callbacks=[callback]).fit(On(training))
    told = [str(one.message) for one in recwarn if "training examples, too" in str(one.message)]
    assert [message.split(" are ")[0] for message in told] == [f"{shared} of {len(outer)} outer examples"] * bool(
        shared
    )


@pytest.mark.parametrize(
    ("batches", "options", "told"),
    [
        (40, {}, None),
        (39, {}, "of 39 training batches has 9 hyper steps"),
        (39, {"start_after_batches": 32}, "has one hyper step"),
        (3, {}, "has no hyper step"),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:IFTHypergradient made no hyper step")
def test_too_few_hyper_steps_are_told_at_the_beginning(batches, options, told, caplog):
    callback = IFTHypergradient(4, **options)
    with caplog.at_level("INFO", logger="lightning.pytorch"):
        quiet_trainer(max_steps=batches, max_epochs=-1, callbacks=[callback]).fit(Classifier())
    assert ("moves the hyperparameters hardly at all" in caplog.text) == (told is not None)
    assert told is None or told in caplog.text


def test_batches_and_not_optimizer_steps_are_counted(caplog):
    with caplog.at_level("INFO", logger="lightning.pytorch"):
        quiet_trainer(max_steps=5, max_epochs=-1, accumulate_grad_batches=8, callbacks=[IFTHypergradient(4)]).fit(
            Classifier()
        )
    assert "moves the hyperparameters hardly at all" not in caplog.text


def test_a_run_without_a_hyper_step_is_told_at_its_end():
    callback = IFTHypergradient(4, start_after_batches=3)
    with pytest.warns(UserWarning, match=r"no hyper step, .* came 4 training batches after the first 3"):
        quiet_trainer(max_steps=6, max_epochs=-1, callbacks=[callback]).fit(Classifier())


def test_frozen_hyperparameters_need_no_hyper_step():
    quiet_trainer(max_steps=6, max_epochs=-1, callbacks=[IFTHypergradient(1)]).fit(
        Classifier().freeze_hyperparameters()
    )


class Penalized(Classifier):
    def outer_loss(self, batch):
        return super().outer_loss(batch) + self.decay()


class Weighted(Classifier):
    def __init__(self):
        super().__init__()
        self.register_hyperparameter("terms", nn.ModuleList([LossWeights(2)]))
        self.register_hyperparameter("own", torch.zeros(()))

    def inner_loss(self, batch):
        loss = super().inner_loss(batch)
        return self.terms[0](torch.stack([loss, loss.square()]))

    def outer_loss(self, batch):
        return super().outer_loss(batch) * (1 + self.own.square() + self.own)


@pytest.mark.parametrize(("make", "told"), [(Penalized, "'decay'.* contains WeightDecay"), (Weighted, None)])
def test_a_penalty_in_the_outer_loss_is_told(make, told, recwarn):
    """A hyperparameter of one's own may enter the outer loss by itself."""
    quiet_trainer(max_steps=2, callbacks=[IFTHypergradient(1)]).fit(make())
    messages = [str(one.message) for one in recwarn if "by itself" in str(one.message)]
    assert len(messages) == (told is not None)
    assert told is None or "hyperparameter 'decay' by itself" in messages[0]
    assert WeightDecay.is_for_training_loss
