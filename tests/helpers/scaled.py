"""A module that knows nothing of this package, and its bilevel versions with a scale to tune."""

import lightning as L
import torch
import torch.nn.functional as F
from torch import nn

from lightning_ifthpo import BilevelLightningModule


class Plain(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.layer(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class NoOuterLoss(BilevelLightningModule, Plain):
    def __init__(self):
        super().__init__()
        self.register_hyperparameter("scale", torch.ones(3))


class Scaled(NoOuterLoss):
    def inner_loss(self, batch):
        return F.cross_entropy(self.layer(batch[0]) * self.scale, batch[1])

    def outer_loss(self, batch):
        return F.cross_entropy(self.layer(batch[0]), batch[1])
