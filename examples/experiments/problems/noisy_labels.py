"""3,000 MNIST images of which 40 % have a wrong label, and a weight for each of them, learned from 400 clean images."""

from __future__ import annotations

from typing import Any, NamedTuple

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from examples.experiments.common import mnist_5k, quiet_trainer, random_batches
from lightning_ifthpo import BilevelLightningModule
from lightning_ifthpo.hyperparameters import SampleWeights

NOISY, CLEAN, HELD_OUT, TEST = 3000, 400, 100, 1500  # images
WRONG = 0.4  # of the noisy labels
BATCH_SIZE = 250
LEARNING_RATE, HYPER_LEARNING_RATE = 0.1, 0.1
WARM_UP = 100  # steps without hyper steps: a fresh network cannot tell right labels from wrong ones
HYPER_EVERY = 5  # steps
LEARN_STEPS, FINAL_STEPS = 500, 800  # of the run that learns the weights, and of each run after it
CHECK_EVERY = 20  # steps


class Data(NamedTuple):
    """Images with labels; `wrong` [3000] marks the wrong noisy labels, for the oracle and the AUC only."""

    noisy: TensorDataset
    clean: TensorDataset
    held_out: TensorDataset
    test: TensorDataset
    wrong: Tensor


def load_data(seed: int) -> Data:
    """Splits 5,000 MNIST images and makes some of the labels wrong."""
    images, y = mnist_5k()
    x, generator = images / 255, torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x), generator=generator)
    noisy, clean, held_out, test = (
        TensorDataset(x[part], y[part]) for part in torch.split(order, [NOISY, CLEAN, HELD_OUT, TEST])
    )
    labels = noisy.tensors[1]
    chosen = torch.randperm(NOISY, generator=generator)[: int(WRONG * NOISY)]
    labels[chosen] = (labels[chosen] + torch.randint(1, 10, chosen.shape, generator=generator)) % 10
    wrong = torch.zeros(NOISY, dtype=torch.bool).index_fill(0, chosen, True)
    return Data(noisy, clean, held_out, test, wrong)


def make_net() -> nn.Module:
    """Returns a fresh convolutional network."""
    first, second = nn.Conv2d(1, 12, 5, stride=2), nn.Conv2d(12, 24, 5, stride=2)
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Flatten(), nn.Linear(384, 10))


class WeightLearner(BilevelLightningModule, L.LightningModule):
    """A network, and a weight for each of its training images."""

    weights: SampleWeights

    def __init__(self) -> None:
        super().__init__()
        self.net = make_net()
        self.register_hyperparameter("weights", SampleWeights(NOISY))

    def inner_loss(self, batch: Any) -> Tensor:
        """Returns the weighted loss on noisy labels, which the network minimizes."""
        images, labels, index = batch
        logits = self.mark_outputs(self.net(images))
        losses: Tensor = self.weights(index) * F.cross_entropy(logits, labels, reduction="none")
        return losses.mean()

    def outer_loss(self, batch: Any) -> Tensor:
        """Returns the loss on clean images, which the weights minimize."""
        images, labels = batch
        return F.cross_entropy(self.net(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Returns the optimizer of the network."""
        return torch.optim.SGD(self.inner_parameters(), lr=LEARNING_RATE)

    def configure_hyper_optimizer(self) -> torch.optim.Optimizer:
        """Returns the optimizer of the weights."""
        return torch.optim.Adam(self.hyperparameters(), lr=HYPER_LEARNING_RATE)


class Check(NamedTuple):
    """A look at a network in training; the least of its checks is the one with the lowest held-out loss."""

    held_out_loss: float
    step: int
    test_accuracy: float


class Classifier(L.LightningModule):
    """A network that learns from images, labels and given weights."""

    def __init__(self, data: Data) -> None:
        super().__init__()
        self.net = make_net()
        self.data = data
        self.extra_products: list[Check] = []

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
            images, labels = self.data.held_out.tensors
            loss = F.cross_entropy(self.net(images), labels)
            images, labels = self.data.test.tensors
            right = self.net(images).argmax(dim=1) == labels
            self.extra_products.append(Check(float(loss), step, float(right.float().mean())))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Returns plain gradient descent."""
        return torch.optim.SGD(self.parameters(), lr=LEARNING_RATE)


def batches(dataset: Dataset[Any], steps: int, seed: int) -> Any:
    """Returns shuffled batches for all steps of a run."""
    return random_batches(dataset, BATCH_SIZE, steps, seed)


def training_sets(data: Data, learned: dict[str, Tensor]) -> dict[str, Dataset[Any]]:
    """Returns the images, labels and weights that each method trains on."""
    noisy, clean = (TensorDataset(*part.tensors, torch.ones(len(part))) for part in (data.noisy, data.clean))
    # Learned weights lie between 0 and 2, and the oracle uses the ends.
    trust = {**learned, "oracle": 2.0 * ~data.wrong}
    weighted = {name: TensorDataset(*data.noisy.tensors, weights) + clean for name, weights in trust.items()}
    return {"noisy": noisy, "clean": clean, "both": noisy + clean, **weighted}


def train(dataset: Dataset[Any], data: Data, seed: int, steps: int) -> list[Check]:
    """Trains a fresh network and returns its checks."""
    torch.manual_seed(seed)
    classifier = Classifier(data)
    quiet_trainer().fit(classifier, batches(dataset, steps, seed + 2))
    return classifier.extra_products
