"""Mistakes with which training goes on."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Subset, SubsetRandomSampler, TensorDataset, random_split

from lightning_ifthpo import IFTHypergradient
from lightning_ifthpo.hyperparameters import IndexedDataset, LossWeights, SampleWeights, SoftLabels, WeightDecay
from lightning_ifthpo.runtime.advice import _shared_examples
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
    assert [message.split(" are ")[0] for message in told] == [
        f"IFTHypergradient: {shared} of {len(outer)} outer examples"
    ] * bool(shared)


class PerExample(On):
    """Has a hyperparameter with a row for each training example."""

    def __init__(self, data, rows):
        super().__init__(data)
        self.register_hyperparameter("rows", rows)

    def inner_loss(self, batch):
        x, y, index = batch
        losses = F.cross_entropy(self.net(x), y, reduction="none")
        return (self.rows(index).reshape(len(x), -1).T * losses).mean() + self.decay()


FEW, MANY = (lambda: SampleWeights(15)), (lambda: SoftLabels(torch.zeros(17, dtype=torch.int64), 3))
INDEXED = {"indexed": IndexedDataset(FIRST), "a part of indexed ones": Subset(IndexedDataset(FIRST), range(8))}


@pytest.mark.parametrize("data", INDEXED)
def test_a_table_that_does_not_fit_the_training_set_is_told_before_the_first_batch(data):
    def fit(make):
        quiet_trainer(max_steps=2, callbacks=[IFTHypergradient(1)]).fit(PerExample(INDEXED[data], make()))

    with pytest.raises(ValueError, match=r"'rows' is a SampleWeights for 15 .*, and the IndexedDataset .* has 16"):
        fit(FEW)
    with pytest.warns(UserWarning, match=r"'rows' is a SoftLabels for 17 .* has 16, .* len\(train\)"):
        fit(MANY)


def test_a_table_that_fits_is_not_told_of(recwarn):
    for data in (IndexedDataset(FIRST), TensorDataset(*DATA[:16], torch.arange(16))):
        module = PerExample(data, SampleWeights(16))
        quiet_trainer(max_steps=2, callbacks=[IFTHypergradient(1)]).fit(module)
    assert not [one for one in recwarn if "IndexedDataset" in str(one.message)]


class ByMean(PerExample):
    """Has forgotten reduction="none"."""

    def inner_loss(self, batch):
        return (self.rows(batch[2]) * On.inner_loss(self, batch)).mean()


@pytest.mark.parametrize("make", [PerExample, ByMean])
def test_weights_of_a_mean_loss_are_told_at_the_first_hyper_step(make, recwarn):
    callback = IFTHypergradient(1, start_after_batches=1)
    quiet_trainer(max_epochs=3, callbacks=[callback]).fit(make(IndexedDataset(FIRST), SampleWeights(16)))
    told = [str(one.message) for one in recwarn if "have the same one" in str(one.message)]
    summed_up = [advice for advice in callback.summary().advice if "same hypergradient" in advice]
    assert len(told) == len(summed_up) == (make is ByMean)
    assert all("'rows.logits'" in words and "reduction='none'" in words for words in (*told, *summed_up))


class WithoutLength:
    def __getitem__(self, index):
        return DATA[index]


class Named(WithoutLength):
    """Has keys that are no indices."""

    def __len__(self):
        return 32

    def __getitem__(self, key):
        return DATA[int(key[1:])]


def sampled(indices):
    return DataLoader(DATA, batch_size=4, sampler=SubsetRandomSampler(indices))


NAMED = Named()
UNKNOWN = {
    "disjoint samplers": (sampled(range(16)), sampled(range(16, 32))),
    "no length": (DataLoader(Subset(WithoutLength(), range(8)), batch_size=4), DataLoader(DATA, batch_size=4)),
    "names": [DataLoader(Subset(NAMED, [f"n{index}" for index in range(8)]), batch_size=4)] * 2,
    "a list of batches": (DataLoader(DATA, batch_size=4), list(DataLoader(DATA, batch_size=4))),
}


@pytest.mark.parametrize("kind", UNKNOWN)
def test_nothing_is_told_of_data_that_say_nothing(kind, recwarn):
    training, outer = UNKNOWN[kind]
    module = On(None)
    module.train_dataloader = lambda: training
    quiet_trainer(max_steps=2, callbacks=[IFTHypergradient(1, outer_dataloader=outer)]).fit(module)
    assert not [one for one in recwarn if "training examples, too" in str(one.message)]


def test_many_indices_are_counted_in_no_time():
    """As tensors and not as numbers they took seconds for a million."""
    order = torch.randperm(100_000, generator=torch.Generator().manual_seed(0))
    data = TensorDataset(torch.zeros(100_000))
    assert _shared_examples(Subset(data, order[:60_000]), Subset(data, order[50_000:])) == 10_000


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


class Unsized:
    """A loader of unknown length."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


@pytest.mark.parametrize("options", [{"max_epochs": 2}, {"fast_dev_run": True}], ids=["unknown length", "fast_dev_run"])
def test_nothing_is_told_where_the_length_says_nothing(options, caplog):
    module = Classifier()
    if "max_epochs" in options:
        loader = Classifier.train_dataloader(module)
        module.train_dataloader = lambda: Unsized(loader)
    with caplog.at_level("INFO", logger="lightning.pytorch"):
        quiet_trainer(callbacks=[IFTHypergradient(1)], **options).fit(module)
    assert "moves the hyperparameters hardly at all" not in caplog.text


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


def test_frozen_hyperparameters_need_no_hyper_step_and_no_outer_data(caplog):
    module = Classifier().freeze_hyperparameters()
    module.outer_dataloader = lambda: None
    with caplog.at_level("INFO", logger="lightning.pytorch"):
        quiet_trainer(max_steps=6, max_epochs=-1, limit_val_batches=0, callbacks=[IFTHypergradient(1)]).fit(module)
    assert "IFTHypergradient" not in caplog.text


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
