"""Small runs with one fault each, and the same without."""

from __future__ import annotations

import copy

import lightning as L
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, TensorDataset

from lightning_ifthpo import BilevelLightningModule, IFTHypergradient, TrainingReport
from lightning_ifthpo.hyperparameters import WeightDecay
from tests.helpers.trainers import quiet_trainer

CLASSES, INPUTS, BATCH = 4, 16, 20


def blobs(n, seed, noise=1.5):
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(CLASSES, INPUTS, generator=torch.Generator().manual_seed(99))
    y = torch.randint(CLASSES, (n,), generator=generator)
    return TensorDataset(centers[y] + noise * torch.randn(n, INPUTS, generator=generator), y)


class Plain(L.LightningModule):
    """A network without hyperparameters."""

    shuffle, lr, optimizer, n = True, 0.05, torch.optim.SGD, 400

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(INPUTS, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, CLASSES)
        )

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self):
        return self.optimizer(self.parameters(), lr=self.lr)

    def train_dataloader(self):
        return DataLoader(blobs(self.n, 0), BATCH, shuffle=self.shuffle)

    def val_dataloader(self):
        return DataLoader(blobs(200, 2), 100)


class WithAdam(Plain):
    lr, optimizer = 3e-3, torch.optim.AdamW


class FullBatch(Plain):
    """Training at the edge of stability."""

    lr = 0.3

    def train_dataloader(self):
        return DataLoader(blobs(100, 0), 100)


class FineTuned(Plain):
    """A frozen body under a head that trains."""

    def __init__(self):
        super().__init__()
        self.net[:4].requires_grad_(False)


class FrozenStem(Plain):
    """The first layer and its BatchNorm, frozen as usual in fine-tuning."""

    def __init__(self):
        super().__init__()
        self.net[:2].requires_grad_(False)
        self.net[1].eval()


class FrozenBody(Plain):
    """A body in evaluation mode, with dropout."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Sequential(nn.Linear(INPUTS, 32), nn.BatchNorm1d(32), nn.Dropout(0.2)), nn.Linear(32, CLASSES)
        )
        self.net[0].requires_grad_(False).eval()


class WithTeacher(Plain):
    """A frozen copy of the network, and a constant inside the module."""

    def __init__(self):
        super().__init__()
        self.constant = nn.Parameter(torch.ones(CLASSES), requires_grad=False)
        self.teacher = copy.deepcopy(self.net).requires_grad_(False)

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            wanted = self.teacher(batch[0]) * self.constant
        return super().training_step(batch, batch_idx) + 0.1 * F.mse_loss(self.net(batch[0]), wanted)


class Averaged(Plain):
    """A running mean of the weights, which requires gradients and is in no optimizer."""

    def __init__(self):
        super().__init__()
        self.mean = AveragedModel(self.net)

    def configure_optimizers(self):
        return torch.optim.SGD(self.net.parameters(), lr=self.lr)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.mean.update_parameters(self.net)


class SingleExamples(Plain):
    """One example in a batch, from which half of all ReLU units get no gradient."""

    lr = 0.01

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(INPUTS, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, CLASSES))

    def train_dataloader(self):
        return DataLoader(blobs(self.n, 0), 1, shuffle=True)


class Factors(Plain):
    """Two tables of which a batch uses some rows."""

    def __init__(self):
        super().__init__()
        self.left, self.right = (nn.Parameter(0.1 * torch.randn(400, CLASSES)) for _ in range(2))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]) + self.left[batch[2]] * self.right[batch[2]], batch[1])

    def train_dataloader(self):
        return DataLoader(TensorDataset(*blobs(400, 0).tensors, torch.arange(400)), BATCH, shuffle=True)


class WithDropout(Plain):
    def __init__(self):
        super().__init__()
        self.net.insert(3, nn.Dropout(0.2))


class InOrder(Plain):
    """Not shuffled, and without an order that matters."""

    shuffle = False


class NaNBatch(Plain):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * float("nan") if self.global_step == 60 else loss


class RateTooHigh(Plain):
    lr = 3.0

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(INPUTS, 32), nn.Tanh(), nn.Linear(32, CLASSES))

    def training_step(self, batch, batch_idx):
        return F.mse_loss(self.net(batch[0]), F.one_hot(batch[1], CLASSES).float(), reduction="sum") / len(batch[1])


class JustTooHigh(Plain):
    """A loss that stays where it is, beyond the edge."""

    lr = 20.0

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(INPUTS, 32), nn.Tanh(), nn.Linear(32, CLASSES))


class ThrownBack(Plain):
    """Momentum at a rate ten times too high: the loss jumps, stays below its start, and hardly falls."""

    lr = 1.5

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(INPUTS, 64), nn.ReLU(), nn.Linear(64, CLASSES))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


class NoisyLabels(ThrownBack):
    """A good rate, and a loss that cannot fall far because most labels are drawn by chance."""

    lr = 0.03

    def train_dataloader(self):
        x, y = blobs(self.n, 0).tensors
        by_chance = torch.randint(CLASSES, (self.n,), generator=torch.Generator().manual_seed(5))
        return DataLoader(
            TensorDataset(x, torch.where(torch.arange(self.n) % 4 > 0, by_chance, y)), BATCH, shuffle=True
        )


class HardlyMoved(Plain):
    lr = 1e-6


class AdamTooHigh(WithAdam):
    lr = 1.0


class DecayTooStrong(Plain):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr, weight_decay=3.0)


class DeadLayer(Plain):
    def __init__(self):
        super().__init__()
        nn.init.constant_(self.net[3].bias, -100.0)


class DeadUnits(Plain):
    def __init__(self):
        super().__init__()
        with torch.no_grad():
            self.net[3].bias[:24] = -100.0


class Forgotten(Plain):
    """One layer is not in the optimizer."""

    def configure_optimizers(self):
        return torch.optim.SGD([*self.net[:3].parameters(), *self.net[5:].parameters()], lr=self.lr)


class Frozen(Plain):
    def __init__(self):
        super().__init__()
        self.net[3].requires_grad_(False)


class Unused(Plain):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(32, 32)


class Evaluating(Plain):
    def __init__(self):
        super().__init__()
        self.net[1].eval()


class TrainingInValidation(Plain):
    def on_validation_batch_start(self, batch, batch_idx, dataloader_idx=0):
        self.net.train()


class Sorted(Plain):
    shuffle = False

    def train_dataloader(self):
        data = blobs(self.n, 0)
        order = data.tensors[1].argsort()
        data = TensorDataset(*(tensor[order] for tensor in data.tensors))
        return DataLoader(data, 5, shuffle=self.shuffle)

    @classmethod
    def in_random_order(cls):
        return type("Shuffled", (cls,), {"shuffle": True})


class Tuned(BilevelLightningModule, L.LightningModule):
    """A network with one decay for each tensor."""

    lr, kind, initial, maximum = 0.1, WeightDecay, 1e-3, 1.0
    shared, train_size, outer_size = False, 200, 400

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(INPUTS, 32), nn.ReLU(), nn.Linear(32, CLASSES))
        self.register_hyperparameter(
            "decay", WeightDecay(self.net, "tensor", initial=self.initial, maximum=self.maximum)
        )

    def inner_loss(self, batch):
        return F.cross_entropy(self.mark_outputs(self.net(batch[0])), batch[1]) + self.decay()

    def outer_loss(self, batch):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.outer_loss(batch))

    def configure_optimizers(self):
        return torch.optim.SGD(self.inner_parameters(), lr=self.lr)

    def train_dataloader(self):
        self.data = blobs(self.train_size, 0)
        return DataLoader(self.data, BATCH, shuffle=True)

    def outer_dataloader(self):
        return DataLoader(self.data if self.shared else blobs(self.outer_size, 1), BATCH)

    def val_dataloader(self):
        return DataLoader(blobs(400, 2), 200)


class OuterIsTraining(Tuned):
    shared = True


class HyperRateTooHigh(Tuned):
    hyper_lr = 3.0

    def configure_hyper_optimizer(self):
        return torch.optim.Adam(self.hyperparameters(), lr=self.hyper_lr)


class AtBound(Tuned):
    """Few and noisy examples, which want more decay than there may be."""

    initial, maximum, lr = 0.00119, 0.0012, 0.3

    def train_dataloader(self):
        return DataLoader(blobs(60, 0, 3.0), BATCH, shuffle=True)

    def outer_dataloader(self):
        return DataLoader(blobs(400, 1, 3.0), BATCH)


class ByHeart(Tuned):
    """One decay per weight and a handful of outer examples."""

    train_size, outer_size = 60, 16

    def __init__(self):
        super().__init__()
        self.register_hyperparameter("targets", torch.zeros(60, CLASSES))

    def inner_loss(self, batch):
        x, y, index = batch
        target = (self.targets[index] + 3 * F.one_hot(y, CLASSES)).softmax(1)
        return F.cross_entropy(self.mark_outputs(self.net(x)), target) + self.decay()

    def train_dataloader(self):
        return DataLoader(TensorDataset(*blobs(60, 0, 3.0).tensors, torch.arange(60)), BATCH, shuffle=True)

    def outer_dataloader(self):
        return DataLoader(blobs(self.outer_size, 1, 3.0), self.outer_size)

    def val_dataloader(self):
        return DataLoader(blobs(400, 2, 3.0), 400)


class DecayExplodes(Tuned):
    """A decay without a bound, in a direction that outer data with wrong labels prefer."""

    lr = 0.05

    def __init__(self):
        super().__init__()
        self.register_hyperparameter("log_decay", torch.tensor(-5.0))

    def inner_loss(self, batch):
        penalty = sum(weight.square().sum() for weight in self.net.parameters())
        return super().inner_loss(batch) + self.log_decay.exp() * penalty

    def configure_hyper_optimizer(self):
        return torch.optim.Adam(self.hyperparameters(), lr=0.45)

    def outer_dataloader(self):
        x, y = blobs(self.outer_size, 1).tensors
        return DataLoader(TensorDataset(x, y.roll(1)), BATCH)


def run(make, *callbacks, steps=200, path, **options):
    """Trains, and returns the report."""
    torch.manual_seed(1)
    module = make()
    report = TrainingReport(path, every_n_batches=5)
    tuners = [IFTHypergradient(5)] if isinstance(module, Tuned) and not callbacks else []
    defaults = {"max_steps": steps, "max_epochs": -1}
    trainer = quiet_trainer(callbacks=[*tuners, *callbacks, report], **(defaults | options))
    trainer.fit(module)
    return report
