"""Eight small training problems of different kinds, on which learning rates are compared, and how they are trained."""

from __future__ import annotations

import argparse
import inspect
import math
import pydoc_data.topics
import typing
from collections.abc import Callable
from functools import cache
from statistics import fmean
from typing import Any, Literal, NamedTuple

import lightning as L
import torch
import torch.nn.functional as F
from mnist1d.data import get_dataset_args, make_dataset
from sklearn.datasets import load_breast_cancer, load_wine
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.utils.data import TensorDataset

from examples.experiments.common import Examples, Results, mnist_5k, random_batches

OptimizerName = Literal["SGD", "momentum", "AdamW"]
WINDOW, WIDTH = 64, 64  # characters that the transformer sees, and its width


def criterion(outputs: Tensor, targets: Tensor) -> Tensor:
    """Returns the mean cross-entropy of labels or characters, or the mean squared error."""
    if targets.is_floating_point():
        return F.mse_loss(outputs, targets)
    return F.cross_entropy(outputs.flatten(0, -2), targets.flatten())


class Problem(NamedTuple):
    """A network at its start, its training examples, others to choose a rate by, and others to report."""

    net: nn.Module
    training: Examples
    held_out: Examples
    test: Examples

    @property
    def weights(self) -> list[nn.Parameter]:
        """Those that are trained."""
        return [weight for weight in self.net.parameters() if weight.requires_grad]

    def loss(self, batch: Examples) -> Tensor:
        """Returns the `criterion`."""
        inputs, targets = batch
        return criterion(self.net(inputs), targets)

    @torch.no_grad()
    def held_out_loss(self, examples: Examples) -> float:
        """Returns the loss of the network in evaluation mode."""
        self.net.eval()
        loss = float(self.loss(examples))
        self.net.train()
        return loss


class Workload(NamedTuple):
    """A problem with the optimizer, the number of steps and the size of batches that it is trained with.

    Grids of seven rates begin at `lowest`, and each rate is twice the one before.
    """

    make: Callable[[int], Problem]
    optimizer: OptimizerName
    steps: int
    batch: int
    lowest: float

    @property
    def rates(self) -> list[float]:
        """The grid."""
        return [self.lowest * 2**power for power in range(7)]


def split(examples: Examples, sizes: tuple[int, int, int], seed: int) -> list[Examples]:
    """Returns random parts of the examples, for training, for choosing and for reporting."""
    inputs, targets = examples
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(seed))
    parts = torch.split(order[: sum(sizes)], list(sizes))
    return [(inputs[part], targets[part]) for part in parts]


# Text


class Block(nn.Module):
    """Causal attention and a perceptron, each behind a normalization and beside a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.before_attention, self.before_perceptron = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.wide, self.narrow = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, T, WIDTH] to the same shape."""
        heads = self.qkv(self.before_attention(x)).unflatten(-1, (3, 4, -1)).movedim(-3, 0).transpose(-2, -3)
        query, key, value = heads
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(attended.transpose(-2, -3).flatten(-2))
        y: Tensor = x + self.narrow(F.gelu(self.wide(self.before_perceptron(x))))
        return y


class CharacterTransformer(nn.Module):
    """Two blocks on characters of ASCII."""

    def __init__(self) -> None:
        super().__init__()
        self.characters, self.places = nn.Embedding(128, WIDTH), nn.Embedding(WINDOW, WIDTH)
        self.blocks = nn.Sequential(Block(), Block(), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 128))

    def forward(self, characters: Tensor) -> Tensor:
        """Returns logits [B, T, 128] of the next characters of [B, T]."""
        logits: Tensor = self.blocks(self.characters(characters) + self.places.weight)
        return logits


def windows(text: str) -> Examples:
    """Returns pieces of a text, characters and the next ones, each [N, WINDOW]."""
    codes = torch.tensor(list(text.encode("ascii", "replace")))
    codes = codes[: (len(codes) - 1) // WINDOW * WINDOW + 1]
    return codes[:-1].view(-1, WINDOW), codes[1:].view(-1, WINDOW)


@cache
def prose() -> Examples:
    """Returns Python's description of its language, 7,266 pieces."""
    return windows("\n".join(pydoc_data.topics.topics.values()))


@cache
def code() -> Examples:
    """Returns the source of three modules of Python, 4,000 pieces."""
    return windows("\n".join(inspect.getsource(module) for module in (argparse, inspect, typing)))


def transformer(seed: int) -> Problem:
    """Returns a transformer that is to predict characters of prose."""
    torch.manual_seed(seed)
    return Problem(CharacterTransformer(), *split(prose(), (6000, 400, 800), seed))


class LoRA(nn.Module):
    """A frozen linear layer and a product of two narrow matrices, zero at the start (Hu et al. 2021)."""

    def __init__(self, linear: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(linear.in_features, rank) / linear.in_features**0.5)
        self.up = nn.Parameter(torch.zeros(rank, linear.out_features))

    def forward(self, x: Tensor) -> Tensor:
        """Maps [..., in] to [..., out]."""
        frozen: Tensor = self.linear(x)
        return frozen + x @ self.down @ self.up


@cache
def pretrained() -> dict[str, Tensor]:
    """Returns the weights of a transformer that was trained on prose."""
    problem = transformer(seed=100)
    optimizer = torch.optim.AdamW(problem.net.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, 600)
    for batch in random_batches(TensorDataset(*problem.training), 32, 600, seed=0):
        optimizer.zero_grad()
        problem.loss(batch).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    weights: dict[str, Tensor] = problem.net.state_dict()
    return weights


def lora(seed: int) -> Problem:
    """Returns a transformer, trained on prose, that is to learn code by narrow matrices beside its own."""
    net = CharacterTransformer()
    net.load_state_dict(pretrained())
    net.requires_grad_(False)
    torch.manual_seed(seed)
    for block in net.blocks[:2]:
        for name in ("qkv", "out", "wide", "narrow"):
            setattr(block, name, LoRA(getattr(block, name)))
    return Problem(net, *split(code(), (2500, 500, 800), seed))


# Numbers, sequences and images


class Recurrent(nn.Module):
    """A GRU that reads a sequence of numbers, and a linear layer on its last state."""

    def __init__(self) -> None:
        super().__init__()
        self.gru, self.out = nn.GRU(1, 32, batch_first=True), nn.Linear(32, 10)

    def forward(self, sequence: Tensor) -> Tensor:
        """Returns logits [B, 10] of sequences [B, T]."""
        logits: Tensor = self.out(self.gru(sequence.unsqueeze(-1))[0][:, -1])
        return logits


@cache
def mnist_1d() -> Examples:
    """Returns 5,000 sequences of 40 numbers in ten classes (Greydanus and Kobak 2020)."""
    data = make_dataset(get_dataset_args())
    inputs, labels = ([data[part], data[f"{part}_test"]] for part in "xy")
    return torch.cat([torch.tensor(x, dtype=torch.float32) for x in inputs]), torch.cat([*map(torch.tensor, labels)])


def recurrent(seed: int) -> Problem:
    """Returns a GRU and sequences."""
    torch.manual_seed(seed)
    return Problem(Recurrent(), *split(mnist_1d(), (4000, 400, 600), seed))


def standardized(values: Tensor) -> Tensor:
    """Returns columns with mean zero and variance one."""
    return (values - values.mean(0)) / values.std(0)


def regression(seed: int) -> Problem:
    """Returns a perceptron that is to tell the largest values of ten measurements from means and deviations."""
    table = standardized(torch.tensor(load_breast_cancer().data, dtype=torch.float32))
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    return Problem(net, *split((table[:, :20], table[:, 20:]), (400, 69, 100), seed))


def wine(seed: int) -> Problem:
    """Returns a perceptron and 100 wines of three kinds that are easy to tell apart."""
    table = load_wine()
    inputs = standardized(torch.tensor(table.data, dtype=torch.float32))
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(13, 32), nn.ReLU(), nn.Linear(32, 3))
    return Problem(net, *split((inputs, torch.tensor(table.target)), (100, 30, 48), seed))


def images() -> Examples:
    """Returns 5,000 images of MNIST, pixels from 0 to 1."""
    pixels, digits = mnist_5k()
    return pixels / 255, digits


def deep(seed: int) -> Problem:
    """Returns a perceptron of twelve layers, without normalization, and digits."""
    torch.manual_seed(seed)
    hidden = [layer for _ in range(10) for layer in (nn.Linear(64, 64), nn.ReLU())]
    net = nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), *hidden, nn.Linear(64, 10))
    for module in net:
        if isinstance(module, nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            nn.init.zeros_(module.bias)
    return Problem(net, *split(images(), (4000, 400, 600), seed))


def convolutional(seed: int) -> Problem:
    """Returns a network of convolutions with BatchNorm, and digits."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        *(nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(16 * 49, 10)),
    )
    return Problem(net, *split(images(), (4000, 400, 600), seed))


def autoencoder(seed: int) -> Problem:
    """Returns an autoencoder with BatchNorm that sends digits through 16 numbers."""
    pixels = images()[0].flatten(1)
    torch.manual_seed(seed)

    def layer(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs), nn.ReLU()]

    net = nn.Sequential(*layer(784, 128), nn.Linear(128, 16), *layer(16, 128), nn.Linear(128, 784), nn.Sigmoid())
    return Problem(net, *split((pixels, pixels), (4000, 400, 600), seed))


WORKLOADS = {
    "transformer": Workload(transformer, "AdamW", steps=400, batch=8, lowest=0.0005),
    "GRU": Workload(recurrent, "AdamW", steps=500, batch=40, lowest=0.001),
    "regression": Workload(regression, "AdamW", steps=200, batch=32, lowest=0.0005),
    "deep ReLU": Workload(deep, "momentum", steps=400, batch=32, lowest=0.001),
    "wine": Workload(wine, "SGD", steps=60, batch=32, lowest=0.08),
    "convolutions": Workload(convolutional, "SGD", steps=300, batch=32, lowest=0.04),
    "LoRA": Workload(lora, "AdamW", steps=300, batch=4, lowest=0.0005),
    "autoencoder": Workload(autoencoder, "momentum", steps=500, batch=32, lowest=1),
}


# Training


class Trained(L.LightningModule):
    """A problem with an optimizer, and a schedule if there is one."""

    def __init__(self, problem: Problem, optimizer: Optimizer, schedule: Any = None) -> None:
        super().__init__()
        self.problem, self.net = problem, problem.net
        self.optimizer, self.schedule = optimizer, schedule

    def training_step(self, batch: Examples, batch_idx: int) -> torch.Tensor:
        """Returns the loss."""
        return self.problem.loss(batch)

    def configure_optimizers(self) -> Any:
        """Returns the optimizer, and the schedule for each step."""
        if self.schedule is None:
            return self.optimizer
        return {"optimizer": self.optimizer, "lr_scheduler": {"scheduler": self.schedule, "interval": "step"}}


def own_optimizer(workload: Workload, problem: Problem, lr: float) -> Optimizer:
    """Returns the optimizer of the workload."""
    if workload.optimizer == "AdamW":
        return AdamW(problem.weights, lr=lr)
    return torch.optim.SGD(problem.weights, lr=lr, momentum=0.9 if workload.optimizer == "momentum" else 0.0)


def best_rate(grid: Results) -> float:
    """Returns the rate with the lowest mean of the held-out losses."""
    return float(min(grid, key=lambda rate: mean_or_infinity(grid[rate])))


def mean_or_infinity(by_seed: dict[str, float]) -> float:
    """Returns the mean, or infinity if a run has diverged."""
    found = fmean(by_seed.values())
    return found if math.isfinite(found) else math.inf
