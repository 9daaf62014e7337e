"""Eight small problems on which a tuner has to work as it comes, without settings of its own.

Each has training, outer and held-out examples; the last are for judging alone. Hyperparameters start at a usual value,
or a factor away from it: a decay, a noise or a smoothing is multiplied by the factor, as far as its bound allows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import sklearn.datasets
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from examples.experiments.common import digits_8x8, mnist_5k
from lightning_ifthpo import BilevelLightningModule
from lightning_ifthpo.hyperparameters import (
    DistilledData,
    InputNoise,
    LabelSmoothing,
    RandomDistortion,
    SampleWeights,
    WeightDecay,
)


@dataclass(frozen=True)
class Split:
    """Training, outer and held-out examples, each a tuple of tensors with one entry for each example."""

    train: TensorDataset
    outer: TensorDataset
    held_out: TensorDataset


class Problem(BilevelLightningModule, L.LightningModule):
    """A module with data; its hyperparameters start a factor away from the usual values.

    Args:
        factor: On which side of the usual values hyperparameters start, and how far.
        split: The data, for what depends on them.
    """

    batch_size = 50
    rate = 0.1
    net: Any

    def __init__(self, factor: float, split: Split) -> None:
        super().__init__()
        self.build(split)
        with torch.no_grad():
            self.move(factor)

    @staticmethod
    def data(seed: int) -> Split:
        """Returns the data, of which the seed decides the parts."""
        raise NotImplementedError

    def build(self, split: Split) -> None:
        """Creates the network and the hyperparameters."""
        raise NotImplementedError

    def move(self, factor: float) -> None:
        """Moves each hyperparameter away from its usual value; λ is a logarithm, or nearly so."""
        for hyperparameter in self.hyperparameters():
            hyperparameter.add_(math.log(factor))

    def inner_loss(self, batch: Any) -> Tensor:
        """Returns the cross-entropy on training examples."""
        return F.cross_entropy(self.mark_outputs(self.net(batch[0])), batch[1])

    def outer_loss(self, batch: Any) -> Tensor:
        """Returns the cross-entropy on outer or held-out examples."""
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Returns gradient descent with momentum, for the weights alone."""
        return torch.optim.SGD(self.inner_parameters(), lr=self.rate, momentum=0.9)


class Regression(Problem):
    """Diabetes with 20 useless columns: noise on each column, and a decay for each tensor of weights."""

    decay: WeightDecay
    noise: InputNoise

    batch_size, rate = 30, 0.05

    @staticmethod
    def data(seed: int) -> Split:
        """Returns 150, 120 and 172 patients with 30 columns each."""
        generator = torch.Generator().manual_seed(seed)
        inputs, targets = (torch.tensor(a).float() for a in sklearn.datasets.load_diabetes(return_X_y=True))
        inputs, targets = standardized(inputs), standardized(targets)
        inputs = torch.cat([inputs, torch.randn(len(inputs), 20, generator=generator)], dim=1)
        return shuffled((inputs, targets), (150, 120, 172), generator)

    def build(self, split: Split) -> None:
        """Creates a network with one output."""
        self.net = nn.Sequential(nn.Linear(30, 64), nn.ReLU(), nn.Linear(64, 1), nn.Flatten(0))
        self.register_hyperparameter("decay", WeightDecay(self.net, "tensor", initial=1e-3))
        self.register_hyperparameter("noise", InputNoise((30,), initial=0.1, maximum=3.0))

    def inner_loss(self, batch: Any) -> Tensor:
        """Returns the squared error on noisy columns and the penalty."""
        loss: Tensor = F.mse_loss(self.mark_outputs(self.net(self.noise(batch[0]))), batch[1]) + self.decay()
        return loss

    def outer_loss(self, batch: Any) -> Tensor:
        """Returns the squared error."""
        return F.mse_loss(self.net(batch[0]), batch[1])


class Text(Problem):
    """Which text a line of 24 characters is from: a transformer, with decay, smoothing and noise on its embeddings."""

    decay: WeightDecay
    smoothing: LabelSmoothing
    noise: InputNoise

    batch_size = 32
    CLASSES, LENGTH = 5, 24

    @staticmethod
    def data(seed: int) -> Split:
        """Returns windows of the descriptions that come with scikit-learn; the parts share no character."""
        generator = torch.Generator().manual_seed(seed)
        folder = Path(sklearn.datasets.__file__).parent / "descr"
        texts = sorted((path.read_text(encoding="utf-8") for path in folder.glob("*.rst")), key=len)[-Text.CLASSES :]
        windows = [
            torch.tensor(list(text.encode()[: 120 * Text.LENGTH])).clamp(max=127).view(-1, Text.LENGTH)
            for text in texts
        ]
        labels = torch.arange(len(texts)).repeat_interleave(len(windows[0]))
        return shuffled((torch.cat(windows), labels), (200, 150, 250), generator)

    def build(self, split: Split) -> None:
        """Creates a transformer of one layer."""
        self.embedding = nn.Embedding(128, 32)
        self.place = nn.Parameter(0.1 * torch.randn(self.LENGTH, 32))
        self.layer = nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True, norm_first=True)
        self.head = nn.Linear(32, self.CLASSES)
        self.register_hyperparameter("decay", WeightDecay(self, "tensor", initial=1e-4))
        self.register_hyperparameter("smoothing", LabelSmoothing(self.CLASSES, initial=0.01))
        self.register_hyperparameter("noise", InputNoise(initial=0.1, maximum=3.0))

    def net(self, characters: Tensor) -> Tensor:
        """Returns logits."""
        hidden = self.noise(self.embedding(characters)) + self.place
        logits: Tensor = self.head(self.layer(hidden).mean(1))
        return logits

    def inner_loss(self, batch: Any) -> Tensor:
        """Returns the cross-entropy with smoothed labels and the penalty."""
        loss: Tensor = F.cross_entropy(self.mark_outputs(self.net(batch[0])), self.smoothing(batch[1])) + self.decay()
        return loss


class Images(Problem):
    """200 small digits: a network with BatchNorm, with decay, smoothing and noise on each pixel."""

    decay: WeightDecay
    smoothing: LabelSmoothing
    noise: InputNoise

    @staticmethod
    def data(seed: int) -> Split:
        """Returns 200, 300 and 1,297 images of 8 × 8 pixels."""
        generator = torch.Generator().manual_seed(seed)
        return shuffled(digits_8x8(), (200, 300, 1297), generator)

    def build(self, split: Split) -> None:
        """Creates two convolutions with BatchNorm."""
        self.net = nn.Sequential(
            *(nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
            *(nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(256, 10)),
        )
        self.register_hyperparameter("decay", WeightDecay(self.net, "tensor", initial=1e-4))
        self.register_hyperparameter("smoothing", LabelSmoothing(10, initial=0.01))
        self.register_hyperparameter("noise", InputNoise((64,), initial=0.1))

    def inner_loss(self, batch: Any) -> Tensor:
        """Returns the cross-entropy of noisy images with smoothed labels, and the penalty."""
        logits = self.mark_outputs(self.net(self.noise(batch[0])))
        loss: Tensor = F.cross_entropy(logits, self.smoothing(batch[1])) + self.decay()
        return loss


class WrongLabels(Problem):
    """600 small digits, of which 40 % have a wrong label: one weight for each."""

    weights: SampleWeights

    batch_size = 60

    @staticmethod
    def data(seed: int) -> Split:
        """Returns 600, 200 and 997 images; the training examples come with their indices."""
        generator = torch.Generator().manual_seed(seed)
        split = shuffled(digits_8x8(), (600, 200, 997), generator)
        images, labels = split.train.tensors
        is_wrong = torch.rand(600, generator=generator) < 0.4
        labels = torch.where(is_wrong, torch.randint(10, (600,), generator=generator), labels)
        return Split(TensorDataset(images, labels, torch.arange(600)), split.outer, split.held_out)

    def build(self, split: Split) -> None:
        """Creates a network with one hidden layer."""
        self.net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        self.register_hyperparameter("weights", SampleWeights(len(split.train)))

    def inner_loss(self, batch: Any) -> Tensor:
        """Returns the weighted cross-entropy."""
        images, labels, indices = batch
        losses = F.cross_entropy(self.mark_outputs(self.net(images)), labels, reduction="none")
        weighted: Tensor = self.weights(indices) * losses
        return weighted.mean()


class Decay(Problem):
    """300 images of MNIST at 14 × 14 pixels: one decay for each weight."""

    decay: WeightDecay

    @staticmethod
    def data(seed: int) -> Split:
        """Returns 300, 300 and 2,000 images."""
        return shuffled(mnist_14x14(), (300, 300, 2000), torch.Generator().manual_seed(seed))

    def build(self, split: Split) -> None:
        """Creates a network with one hidden layer."""
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(196, 64), nn.ReLU(), nn.Linear(64, 10))
        self.register_hyperparameter("decay", WeightDecay(self.net, "weight", initial=1e-4))

    def inner_loss(self, batch: Any) -> Tensor:
        """Returns the cross-entropy and the penalty."""
        loss: Tensor = super().inner_loss(batch) + self.decay()
        return loss


class Augmentation(Problem):
    """300 images of MNIST at 14 × 14 pixels: the strengths of six random distortions."""

    distortion: RandomDistortion

    data = Decay.data

    def build(self, split: Split) -> None:
        """Creates two convolutions."""
        self.net = nn.Sequential(
            *(nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(256, 10)),
        )
        self.register_hyperparameter("distortion", RandomDistortion())

    def move(self, factor: float) -> None:
        """Multiplies the widths."""
        self.distortion.logits.add_(math.log(factor))

    def inner_loss(self, batch: Any) -> Tensor:
        """Returns the cross-entropy of distorted images."""
        return super().inner_loss((self.distortion(batch[0]), batch[1]))


class Imbalanced(Problem):
    """Small digits, 80 of each of five classes and 4 of each other: a weight for each class."""

    logits: Tensor

    @staticmethod
    def data(seed: int) -> Split:
        """Returns 420 unbalanced training images, and 200 and about 1,000 balanced ones."""
        generator = torch.Generator().manual_seed(seed)
        images, labels = digits_8x8()
        order = torch.randperm(len(labels), generator=generator)
        by_class = [order[labels[order] == digit] for digit in range(10)]
        counts = [80 if digit < 5 else 4 for digit in range(10)]
        chosen = torch.cat([of[:count] for of, count in zip(by_class, counts, strict=True)])
        rest = torch.cat([of[80:] for of in by_class])
        rest = rest[torch.randperm(len(rest), generator=generator)]
        parts = (chosen, rest[:200], rest[200:])
        return Split(*(TensorDataset(images[part], labels[part]) for part in parts))

    def build(self, split: Split) -> None:
        """Creates a network with one hidden layer."""
        self.net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        self.register_hyperparameter("logits", torch.zeros(10))

    def move(self, factor: float) -> None:
        """Multiplies the weights of the frequent classes."""
        self.logits[:5] += math.log(factor)

    def inner_loss(self, batch: Any) -> Tensor:
        """Returns the weighted cross-entropy; the weights of the classes sum to their number."""
        weights = 10 * self.logits.softmax(0)
        losses = F.cross_entropy(self.mark_outputs(self.net(batch[0])), batch[1], reduction="none")
        return (weights[batch[1]] * losses).mean()


class Distillation(Problem):
    """One synthetic image of each class, from noise, on which a regression is trained."""

    distilled: DistilledData

    rate = 0.5

    @staticmethod
    def data(seed: int) -> Split:
        """Returns one training batch that is not looked at, and 1,000 and 2,000 images of MNIST at 14 × 14 pixels."""
        images, labels = mnist_14x14()
        split = shuffled((images, labels), (10, 1000, 2000), torch.Generator().manual_seed(seed))
        return Split(TensorDataset(*split.train.tensors), split.outer, split.held_out)

    def build(self, split: Split) -> None:
        """Creates a linear classifier."""
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(196, 10))
        self.register_hyperparameter(
            "distilled", DistilledData((1, 14, 14), 10, initial=0.1 * torch.randn(10, 1, 14, 14))
        )

    def move(self, factor: float) -> None:
        """Multiplies the noise."""
        for hyperparameter in self.hyperparameters():
            hyperparameter.mul_(factor)

    def inner_loss(self, batch: Any) -> Tensor:
        """Returns the loss on the synthetic images, whatever the batch, with some weight decay."""
        penalty = sum(weight.square().sum() for weight in self.net.parameters())
        loss: Tensor = super().inner_loss(self.distilled()) + 5e-4 * penalty
        return loss


PROBLEMS: dict[str, type[Problem]] = {
    "regression": Regression,
    "text": Text,
    "images": Images,
    "wrong labels": WrongLabels,
    "weight decay": Decay,
    "augmentation": Augmentation,
    "imbalanced classes": Imbalanced,
    "distillation": Distillation,
}


def mnist_14x14() -> tuple[Tensor, Tensor]:
    """Returns 5,000 images of MNIST [5000, 1, 14, 14], pixels from 0 to 1, and their digits."""
    images, digits = mnist_5k()
    return F.avg_pool2d(images / 255, 2), digits


def standardized(values: Tensor) -> Tensor:
    """Returns values with mean 0 and standard deviation 1 in each column."""
    return (values - values.mean(0)) / values.std(0)


def shuffled(tensors: Iterable[Tensor], sizes: tuple[int, int, int], generator: torch.Generator) -> Split:
    """Returns three disjoint random parts."""
    tensors = list(tensors)
    order = torch.randperm(len(tensors[0]), generator=generator)
    parts = torch.split(order[: sum(sizes)], list(sizes))
    return Split(*(TensorDataset(*(tensor[part] for tensor in tensors)) for part in parts))
