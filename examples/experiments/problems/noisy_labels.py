"""40 % of the labels of 3,000 MNIST images are wrong at random: a weight for each of them, and what it is worth."""

from __future__ import annotations

from typing import Any, NamedTuple

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from examples.experiments.common import quiet_trainer, random_batches
from examples.experiments.problems import label_noise
from examples.experiments.problems.label_noise import LEARNING_RATE, Data, image_net

WRONG = 0.4  # of the labels
BATCH_SIZE = 250
FINAL_STEPS = 800  # of the run after the one that learns the weights
CHECK_EVERY = 20  # steps


def load_data(seed: int) -> Data:
    """Returns a random split of 5,000 MNIST images, with wrong labels."""
    return label_noise.load_data("MNIST", "symmetric", WRONG, seed)


class Check(NamedTuple):
    """A look at a network in training; the least of its checks is the one with the lowest held-out loss."""

    held_out_loss: float
    step: int
    test_accuracy: float


class Classifier(L.LightningModule):
    """A network that learns from images, labels and given weights."""

    def __init__(self, data: Data) -> None:
        super().__init__()
        self.net = image_net()
        self.data = data
        self.checks: list[Check] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Returns the weighted loss."""
        images, labels, weights = batch
        losses: Tensor = weights * F.cross_entropy(self.net(images), labels, reduction="none")
        return losses.mean()

    @torch.no_grad()
    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Makes a check when one is due."""
        step = batch_idx + 1
        if step % CHECK_EVERY == 0:
            loss, accuracy = label_noise.check(self.net, self.data)
            self.checks.append(Check(loss, step, accuracy))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Returns plain gradient descent."""
        return torch.optim.SGD(self.parameters(), lr=LEARNING_RATE)


def batches(dataset: Dataset[Any], steps: int, seed: int) -> Any:
    """Returns shuffled batches for all steps of a run."""
    return random_batches(dataset, BATCH_SIZE, steps, seed)


def train(data: Data, weights: Tensor, seed: int, steps: int) -> list[Check]:
    """Trains a fresh network on weighted noisy labels [3000] and on checked ones, and returns its checks."""
    torch.manual_seed(seed)
    classifier, checked = Classifier(data), data.checked
    dataset = TensorDataset(*data.noisy, weights) + TensorDataset(*checked, torch.ones(len(checked[1])))
    quiet_trainer().fit(classifier, batches(dataset, steps, seed + 2))
    return classifier.checks
