"""Outer losses that are too large to be used."""

import math

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ifthpo import BilevelLightningModule, IFTHypergradient
from lightning_ifthpo.callbacks.outer_level import FACTOR, MEMORY, OuterLevel
from lightning_ifthpo.solvers import Identity
from tests.helpers.trainers import Classifier, quiet_trainer


def never():
    raise AssertionError("not suspicious")


def test_usual_losses_need_no_second_evaluation():
    level = OuterLevel()
    level.begin(2.3)
    for value in (2.3, 2.3 * FACTOR, -1.0, -2.3 * FACTOR):
        assert level.doubt(value, never) == ""
    assert level.accepted == [2.3, 2.3, 2.3 * FACTOR, -1.0, -2.3 * FACTOR]


def test_a_loss_that_is_large_only_by_running_statistics_is_refused_and_forgotten():
    level = OuterLevel([2.0])
    for _ in range(2 * MEMORY):
        assert "1e+13 in eval mode, and 2.1 by the statistics of the same batch" in level.doubt(1e13, lambda: 2.1)
    assert level.accepted == [2.0]
    assert level.doubt(2.0, never) == ""


@pytest.mark.parametrize("other", [1e6, -1e6, math.nan], ids=str)
def test_a_true_change_of_level_is_accepted_at_once(other):
    """A NaN means that the second evaluation was not possible."""
    level, calls = OuterLevel([1.0] * MEMORY), []

    def evaluated():
        calls.append(1)
        return other

    for _ in range(2 * MEMORY):
        assert level.doubt(1e6, evaluated) == ""
    assert len(calls) == 13  # until the median has followed
    assert level.accepted == [1e6] * MEMORY


def test_small_losses_and_zero_do_not_end_the_tuning():
    level = OuterLevel([0.0])
    for value in (0.0, 1e-12, 1.0, 0.0):
        assert level.doubt(value, lambda value=value: value) == ""


class Deep(BilevelLightningModule, L.LightningModule):
    """Normalized layers one after the other: running statistics that lag behind multiply up."""

    def __init__(self, norm):
        super().__init__()
        torch.manual_seed(0)
        layers = [[nn.Linear(16, 16), norm(16), nn.ReLU()] for _ in range(12)]
        self.net = nn.Sequential(*(layer for block in layers for layer in block), nn.Linear(16, 3))
        self.register_hyperparameter("log_decay", torch.tensor(-4.0))

    def inner_loss(self, batch):
        x, y = batch
        return F.cross_entropy(self.net(x), y) + self.log_decay.exp() * self.net[0].weight.square().sum() / 2

    def outer_loss(self, batch):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.inner_parameters(), lr=0.3, momentum=0.9)


class Ema(nn.Module):
    """A normalization of the user's own."""

    def __init__(self, size):
        super().__init__()
        self.register_buffer("scale", torch.ones(size))

    def forward(self, x):
        if self.training:
            own = x.square().mean(0).add(1e-8).sqrt()
            self.scale.mul_(0.999).add_(own.detach(), alpha=1e-3)
            return x / own
        return x / self.scale


def data(n, seed):
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(100 * torch.randn(n, 16, generator=generator), torch.randint(3, (n,), generator=generator))


NORMS = {
    "BatchNorm": nn.BatchNorm1d,
    "slow BatchNorm": lambda size: nn.BatchNorm1d(size, momentum=0.01),
    "cumulative BatchNorm": lambda size: nn.BatchNorm1d(size, momentum=None),
    "own": Ema,
}


class Explosion(Callback):
    """Makes the loss in eval mode what it is in a deep network, for some batches."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        for module in pl_module.modules():
            if isinstance(module, Ema):
                module.scale.fill_(0.1 if 4 <= trainer.global_step < 12 else 1.0)
            elif isinstance(module, nn.BatchNorm1d):
                module.running_var.fill_(1e-2 if 4 <= trainer.global_step < 12 else 1.0)


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("policy", ["skip", "use", "raise"])
def test_explosions_are_skipped_used_or_raised(norm, policy):
    """The running variances are a hundredth of the true ones for 8 of 16 batches."""
    callback = IFTHypergradient(
        1, solver=Identity(), curvature="hessian", on_failure=policy, outer_dataloader=DataLoader(data(32, 1), 8)
    )
    losses = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            losses.append(float(trainer.callback_metrics["hypergrad/outer_loss"]))

    trainer = quiet_trainer(callbacks=[Explosion(), callback, Watch()])
    module = Deep(NORMS[norm])
    module.configure_optimizers = lambda: torch.optim.SGD(module.inner_parameters(), lr=1e-3)
    message = "in eval mode, and .* by the statistics of the same batch"
    if policy == "raise":
        with pytest.raises(RuntimeError, match=message):
            trainer.fit(module, DataLoader(data(128, 0), 8))
        return
    with pytest.warns(UserWarning, match=message):
        trainer.fit(module, DataLoader(data(128, 0), 8))
    exploded = sum(loss > 1e3 for loss in losses)
    assert exploded == 8
    assert callback.skipped == (exploded if policy == "skip" else 0)
    if policy == "skip":
        assert 0.0 < abs(module.log_decay.item() + 4.0) < 0.081  # eight steps of Adam by 0.01 at most


@pytest.mark.parametrize("batch_size", [8, 1])
def test_a_healthy_network_is_never_suspected(batch_size):
    """One example at a time too, which BatchNorm refuses in train mode."""
    callback = IFTHypergradient(1, solver=Identity(), outer_dataloader=DataLoader(data(8, 1), batch_size))

    class Healthy(Classifier):
        def outer_loss(self, batch):
            return F.cross_entropy(self.net(batch[0][:, :4]), batch[1])

    quiet_trainer(max_epochs=5, callbacks=[callback]).fit(Healthy())
    assert callback.skipped == 0


def test_resuming_remembers_the_level(tmp_path):
    callback = IFTHypergradient(1, solver=Identity())
    trainer = quiet_trainer(max_epochs=2, callbacks=[callback])
    trainer.fit(Classifier())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    accepted = callback.state_dict()["stepper"]["outer_losses"]
    assert len(accepted) == 1 + 8  # the level of the dry run, and eight hyper steps
    resumed = IFTHypergradient(1, solver=Identity())
    quiet_trainer(max_epochs=3, callbacks=[resumed]).fit(Classifier(), ckpt_path=tmp_path / "last.ckpt")
    assert resumed.state_dict()["stepper"]["outer_losses"][:9] == accepted
