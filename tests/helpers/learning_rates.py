"""A module whose learning rate is to be chosen, and what notes the rates."""

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import (
    Callback,
)
from torch import nn

from tests.helpers.trainers import loader, quiet_trainer


class Plain(L.LightningModule):
    """A module that has never heard of this package."""

    def __init__(self, optimizer=torch.optim.SGD, scheduler=None, **options):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        self.make_optimizer, self.make_scheduler, self.options = optimizer, scheduler, {"lr": 0.1} | options

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def configure_optimizers(self):
        optimizer = self.make_optimizer(self.parameters(), **self.options)
        return optimizer if self.make_scheduler is None else ([optimizer], [self.make_scheduler(optimizer)])

    def train_dataloader(self):
        return loader()


class Rates(Callback):
    """Notes the rate of each step, at the moment the step has been made."""

    def __init__(self):
        self.rates, self.weights = [], []

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        self.weights.append([p.detach().clone() for p in pl_module.parameters()])

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.rates.append(float(trainer.optimizers[0].param_groups[0]["lr"]))


def fit(module, callback, **options):
    rates = options.pop("rates", Rates())
    trainer = quiet_trainer(callbacks=[callback, rates], **({"max_epochs": 5} | options))
    torch.manual_seed(3)
    trainer.fit(module)
    return trainer, rates
