"""A few images, and networks with one weight decay for each weight, which can be tuned to fit the validation images."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
import torch.nn.functional as F
import torchvision  # type: ignore[import-untyped]
from torch import Tensor, nn

from examples.experiments.common import Examples, accuracy
from examples.experiments.problems import distillation
from lightning_ifthpo import BilevelLightningModule
from lightning_ifthpo.curvature import mark_outputs
from lightning_ifthpo.hyperparameters import WeightDecay

TRAINING, VALIDATION, TEST = 50, 50, 500  # images
HIDDEN = 256
START_AFTER = 10  # steps: validation gradients of random weights carry no information
DECAY = 1e-3  # of each weight, at the start
HYPER_LEARNING_RATE = 0.2
RECORD_EVERY = 5  # steps


def linear(shape: Sequence[int], classes: int) -> nn.Module:
    """Returns logistic regression."""
    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), classes))


def perceptron(shape: Sequence[int], classes: int) -> nn.Module:
    """Returns a network with one hidden layer."""
    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, classes))


def alexnet(shape: Sequence[int], classes: int) -> nn.Module:
    """Returns torchvision's AlexNet for small images, with a smaller output layer and no dropout.

    Without He's initialization it hardly starts to learn.
    """
    net = torchvision.models.alexnet()
    net.features[0] = nn.Conv2d(shape[0], 64, kernel_size=5, stride=2, padding=2)
    net.features[12] = nn.Identity()  # the last pooling: two pixels by two are left before it
    net.avgpool = nn.AdaptiveAvgPool2d(2)
    net.classifier = nn.Linear(256 * 2 * 2, classes)
    for layer in net.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    return net  # type: ignore[no-any-return]


def resnet18(shape: Sequence[int], classes: int) -> nn.Module:
    """Returns torchvision's ResNet18 for images with any number of channels."""
    # Each batch is the whole training set: momentum 0.1 would only let the running statistics lag ten steps behind.
    norm = partial(nn.BatchNorm2d, momentum=0.5)
    net = torchvision.models.resnet18(num_classes=classes, norm_layer=norm)
    net.conv1 = nn.Conv2d(shape[0], 64, kernel_size=7, stride=2, padding=3, bias=False)
    return net  # type: ignore[no-any-return]


class Model(NamedTuple):
    """A network, and how it is trained."""

    title: str
    build: Callable[[Sequence[int], int], nn.Module]
    learning_rate: float
    maximum_decay: float
    steps: int


MODELS = {
    "linear": Model("Linear", linear, 3e-3, 1.0, 200),
    "mlp": Model("Perceptron", perceptron, 1e-3, 1.0, 100),
    # A maximum of 1 undoes what was learned on seed 1 (training accuracy 0.58), one of 0.01 fits less (0.90).
    "alexnet": Model("AlexNet", alexnet, 3e-4, 0.1, 80),
    # Larger decays move weights so fast that running statistics do not follow: training accuracy falls in eval mode.
    "resnet18": Model("ResNet18", resnet18, 3e-4, 0.01, 50),
}


class Split(NamedTuple):
    """Images [N, channels, height, width] with labels."""

    train: Examples
    validation: Examples
    test: Examples
    classes: int

    @property
    def merged(self) -> Split:
        """The same with the validation images among those to train on."""
        images, labels = (torch.cat(pair) for pair in zip(self.train, self.validation, strict=True))
        return self._replace(train=(images, labels))


class Scores(NamedTuple):
    """Accuracies after a number of steps."""

    step: int
    training: float
    validation: float
    test: float


def load_data(name: str, seed: int, root: Path = Path(), download: bool = False) -> Split:
    """Returns a few images of a data set, drawn at random."""
    full = distillation.load_data(name, seed, root, download)
    pairs = zip(full, (TRAINING, VALIDATION, TEST), strict=True)
    train, validation, test = ((images[:size], labels[:size]) for (images, labels), size in pairs)
    return Split(train, validation, test, full.classes)


class Overfitter(BilevelLightningModule, L.LightningModule):
    """A network with one decay for each weight, which stay as they are unless `IFTHypergradient` tunes them.

    Args:
        model: What is trained, and how.
        split: Images to train and to score it on.
    """

    decay: WeightDecay

    def __init__(self, model: Model, split: Split) -> None:
        super().__init__()
        self.net = model.build(split.train[0].shape[1:], split.classes)
        self.learning_rate = model.learning_rate
        self.split = split
        self.history: list[Scores] = []
        decay = WeightDecay(self.net, "weight", initial=DECAY, maximum=model.maximum_decay)
        self.register_hyperparameter("decay", decay)

    def inner_loss(self, batch: Examples) -> Tensor:
        """Returns what the weights minimize."""
        images, labels = batch
        loss: Tensor = F.cross_entropy(mark_outputs(self.net(images)), labels) + self.decay()
        return loss

    def outer_loss(self, batch: Examples) -> Tensor:
        """Returns what the decays minimize."""
        images, labels = batch
        return F.cross_entropy(self.net(images), labels)

    def outer_dataloader(self) -> list[Examples]:
        """Returns the validation images as one batch."""
        return [self.split.validation]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Returns the optimizer of the weights."""
        return torch.optim.Adam(self.inner_parameters(), lr=self.learning_rate)

    def configure_hyper_optimizer(self) -> torch.optim.Optimizer:
        """Returns the optimizer of the decays."""
        return torch.optim.Adam(self.hyperparameters(), lr=HYPER_LEARNING_RATE)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Notes accuracies now and then, and after the last step."""
        step = batch_idx + 1
        if step % RECORD_EVERY == 0 or step == self.trainer.num_training_batches:
            self.net.eval()
            parts = (self.split.train, self.split.validation, self.split.test)
            self.history.append(Scores(step, *(accuracy(self.net, examples) for examples in parts)))
            self.net.train()
