"""What the Trainer, the module and the other callbacks say."""

import types

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_ifthpo import ExactGeN, IFTHypergradient, SharpnessMonitor
from lightning_ifthpo.callbacks.training_report import observations as seen
from lightning_ifthpo.callbacks.training_report.records import Records
from lightning_ifthpo.hyperparameters import SampleWeights, WeightDecay
from tests.callbacks.training_report.planted import OuterIsTraining, Plain, Tuned
from tests.helpers.trainers import quiet_trainer


class Asking(Callback):
    """Asks after each batch."""

    def __init__(self, question):
        self.question, self.answers = question, []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.answers.append(self.question(trainer, pl_module))


def answers(question, module, *callbacks):
    asking = Asking(question)
    quiet_trainer(callbacks=[*callbacks, asking], max_steps=6, limit_val_batches=0).fit(module)
    return asking.answers


def test_learning_rates_of_all_groups():
    class Groups(Plain):
        def configure_optimizers(self):
            parts = [{"params": self.net[:3].parameters()}, {"params": self.net[3:].parameters(), "lr": 0.5}]
            return torch.optim.SGD(parts, lr=0.1)

    rates = answers(lambda trainer, module: dict(seen.learning_rates(trainer)), Groups())
    assert rates[-1] == {"lr/group 0": 0.1, "lr/group 1": 0.5}


def test_metrics_of_all_callbacks_by_their_names():
    callbacks = IFTHypergradient(2), ExactGeN(2), SharpnessMonitor(2, name="mine", max_overhead=None)
    metrics = answers(lambda trainer, module: dict(seen.own_metrics(trainer)), Tuned(), *callbacks)[-1]
    assert {"hypergrad/norm", "hyperparameter/decay/max", "gen/lr", "mine/lambda_max"} <= metrics.keys()
    assert "inner_loss" not in metrics


@pytest.mark.filterwarnings("ignore:.*outer examples are training examples, too")
def test_progress_and_summary_of_the_hyper_steps_agree():
    tuner = IFTHypergradient(2)
    ask = lambda trainer, module: seen.tuning_of(trainer, module, Records(), "shared")  # noqa: E731
    found = answers(ask, Tuned(), tuner)
    assert [tuning.hyper_steps for tuning in found] == [0, 1, 1, 2, 2, 3]
    assert found[-1].made == 3
    assert found[-1].verdict == ""
    assert found[-1].shared == "shared"
    after = seen.tuning_of(types.SimpleNamespace(callbacks=[tuner]), Tuned(), Records(), "")
    assert (after.hyper_steps, after.made) == (3, 3)
    assert (after.predicted, after.confirmed) == (found[-1].predicted, found[-1].confirmed)
    assert after.verdict.startswith("Verdict: ")


def test_without_hyper_steps_there_is_nothing_to_say():
    ask = lambda trainer, module: (seen.tuning_of(trainer, module, Records(), ""), seen.shared_examples(trainer))  # noqa: E731
    assert set(answers(ask, Plain())) == {(None, "")}
    assert set(answers(ask, Tuned().freeze_hyperparameters(), IFTHypergradient(1))) == {(None, "")}


@pytest.mark.filterwarnings("ignore:.*outer examples are training examples, too")
def test_shared_examples_are_told_in_the_words_of_the_package():
    ask = lambda trainer, module: seen.shared_examples(trainer)  # noqa: E731
    assert answers(ask, OuterIsTraining(), IFTHypergradient(1))[0] == "200 of 200"
    assert set(answers(ask, Tuned(), IFTHypergradient(1))) == {""}


def test_shares_of_time():
    ask = lambda trainer, module: seen.shares_of_time(trainer)  # noqa: E731
    monitors = [SharpnessMonitor(1, name=name, max_overhead=None) for name in "ab"]
    shares = answers(ask, Plain(), *monitors)[-1]
    assert list(shares) == ["SharpnessMonitor", "SharpnessMonitor 2"]
    assert all(0.0 < share < 1.0 for share in shares.values())


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"shuffle": True}, True),
        ({}, False),
        ({"sampler": [0, 1]}, None),
    ],
)
def test_whether_data_are_shuffled(options, wanted):
    data = TensorDataset(torch.zeros(4))
    assert seen.is_shuffled(types.SimpleNamespace(train_dataloader=DataLoader(data, **options))) is wanted
    sampler = DistributedSampler(data, num_replicas=2, rank=0, shuffle=True)
    assert seen.is_shuffled(types.SimpleNamespace(train_dataloader=DataLoader(data, sampler=sampler))) is True
    assert seen.is_shuffled(types.SimpleNamespace(train_dataloader=[1, 2])) is None


def trainer_of(*weights):
    """A Trainer whose optimizer has these weights."""
    return types.SimpleNamespace(optimizers=[torch.optim.SGD(weights, 0.1)])


def test_modes_of_layers():
    net = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2), nn.Dropout(), nn.BatchNorm2d(2))
    net[0].eval()
    net[2].eval()
    assert seen.layers_in_evaluation_mode(trainer_of(*net.parameters()), net) == ("0", "2")
    assert seen.layers_in_training_mode(net) == ("3",)


def test_layers_that_do_not_train_may_be_in_evaluation_mode():
    net = nn.Sequential(nn.BatchNorm1d(2), nn.Sequential(nn.Linear(2, 2), nn.Dropout()), nn.Linear(2, 2)).eval()
    assert seen.layers_in_evaluation_mode(trainer_of(*net[2].parameters()), net) == ()
    assert seen.layers_in_evaluation_mode(trainer_of(*net[1].parameters()), net) == ("1.1",)
    net[1].requires_grad_(False)
    assert seen.layers_in_evaluation_mode(trainer_of(*net.parameters()), net) == ("0",)


def test_a_frozen_layer_among_layers_that_train_is_told_from_what_is_frozen_on_purpose():
    def net():
        return nn.Sequential(*(nn.Linear(2, 2) for _ in range(3)), nn.BatchNorm1d(2))

    module = nn.ModuleDict({"body": net(), "head": nn.Linear(2, 2), "copy": net()})
    module.register_parameter("constant", nn.Parameter(torch.ones(1), requires_grad=False))
    trainer = trainer_of(*module.parameters())
    for part in (module["body"][0], module["body"][3], module["copy"]):
        part.requires_grad_(False)
    assert seen.frozen_layers(trainer, module) == ()
    module["body"][1].bias.requires_grad_(False)  # a part of a layer
    assert seen.frozen_layers(trainer, module) == ()
    module["body"][1].requires_grad_(False)  # all layers before it are frozen, too
    assert seen.frozen_layers(trainer, module) == ()
    module["head"].requires_grad_(False)
    assert seen.frozen_layers(trainer, module) == ("head.weight", "head.bias")


def test_copies_of_weights_are_not_watched():
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    net[0].requires_grad_(False)
    net[1].weight.grad = torch.ones(2, 2)
    watched = seen.watched_weights(trainer_of(net[2].weight), net)
    assert [name for name, _ in watched] == ["1.weight", "2.weight"]


def test_weights_without_hyperparameters_and_units():
    module = Tuned()
    assert list(seen.weights_of(module)) == ["net.0.weight", "net.0.bias", "net.2.weight", "net.2.bias"]
    net = nn.Sequential(nn.Embedding(3, 2), nn.Linear(2, 2))
    assert seen.ids_of_units(net) == {id(net[1].weight)}


def test_hyperparameters_are_found_at_their_upper_bound():
    """Weights of examples may be there, a plain tensor has none, and half of the maximum is far away."""
    module = nn.Module()
    module.decay, module.weights, module.other = WeightDecay(nn.Linear(2, 2)), SampleWeights(3), torch.zeros(1)
    records = Records()
    for name in ("decay/mean", "decay/max", "weights/max", "other/max"):
        records.open(f"hyperparameter/{name}").add(0, 0.5)
    assert list(seen._bounds(module, records)) == []
    for name in ("decay/max", "weights/max", "other/max"):
        records.open(f"hyperparameter/{name}").add(1, 0.995 * (2.0 if name == "weights/max" else 1.0))
    (bound,) = seen._bounds(module, records)
    assert (bound.name, bound.value, bound.maximum) == ("decay", 0.995, 1.0)
