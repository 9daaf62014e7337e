"""A module to be watched by SharpnessMonitor, and its dense Hessian."""

import lightning as L
import torch
import torch.nn.functional as F
from torch import nn

from lightning_ifthpo import SharpnessMonitor
from lightning_ifthpo.curvature import HessianOperator, mark_outputs
from tests.helpers.trainers import loader, quiet_trainer


class Plain(L.LightningModule):
    """A module that has never heard of this package; one batch an epoch."""

    def __init__(self, optimizer=torch.optim.SGD, **options):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
        self.optimizer, self.options = optimizer, {"lr": 0.1} | options

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(mark_outputs(self.net(x)), y)
        self.log("loss", loss)
        return {"loss": loss}

    def configure_optimizers(self):
        return self.optimizer(self.parameters(), **self.options)

    def train_dataloader(self):
        return loader(32, batch_size=32)


class OwnOptimizer(Plain):
    """Optimizes manually, by an optimizer of torch that the Trainer does not see."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.inner_loss = lambda batch: F.cross_entropy(self.net(batch[0]), batch[1])

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers(use_pl_optimizer=False)
        optimizer.zero_grad()
        self.inner_loss(batch).backward()
        optimizer.step()


def monitor(**options):
    return SharpnessMonitor(
        **({"every_n_batches": 1, "max_overhead": None, "rtol": 1e-4, "max_iterations": 100} | options)
    )


def fit(module, callback, **options):
    """Trains with a monitor, and returns its metrics and the Trainer."""
    trainer = quiet_trainer(callbacks=[callback], **({"max_epochs": 3} | options))
    trainer.fit(module)
    return {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("sharpness/")}, trainer


def dense_hessian(module, batches=None, dtype=None):
    """The Hessian at the weights that training ended with, which the last measurement saw."""
    x, y = next(iter(module.train_dataloader())) if batches is None else batches
    x = x.to(next(module.parameters()).dtype)
    operator = HessianOperator(lambda: F.cross_entropy(module.net(x), y), list(module.parameters()))
    return operator.to_dense()
