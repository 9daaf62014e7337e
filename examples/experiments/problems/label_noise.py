"""Images and sentences with labels that are wrong at random, in a pattern, or depending on the example.

3,000 training examples of ten classes have labels of which some are wrong. 400 examples have checked labels, and 100
more of them choose the step at which training stops.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from examples.experiments.common import Examples, accuracy, mnist_5k, quiet_trainer, random_batches
from examples.experiments.problems.sentences import sentences_5k
from lightning_ifthpo import BilevelLightningModule, IFTHypergradient
from lightning_ifthpo.hyperparameters import IndexedDataset, LabelTransition, SampleWeights

CLASSES, NOISY, CHECKED, HELD_OUT = 10, 3000, 400, 100  # examples; the others are test data
BATCH_SIZE, LEARNING_RATE = 100, 0.1
LEARN_STEPS, WARM_UP, HYPER_EVERY = 500, 100, 5
WEIGHT_RATE, TRANSITION_RATE = 0.1, 0.007  # of Adam: a step in the logarithm of an odds, or of a probability


class Data(NamedTuple):
    """Examples of a problem. `truth` [3000] are the true labels of the noisy ones: for oracles and figures only."""

    noisy: Examples
    checked: Examples
    held_out: Examples
    test: Examples
    truth: Tensor

    @property
    def wrong(self) -> Tensor:
        """Which labels are wrong, bool [3000]."""
        return self.noisy[1] != self.truth

    def true_transition(self) -> Tensor:
        """Returns how often the label k was given to class c, [10, 10]; rows sum to one."""
        counts = torch.zeros(CLASSES, CLASSES).index_put_(
            (self.truth, self.noisy[1]), torch.ones(len(self.truth)), True
        )
        return counts / counts.sum(1, keepdim=True)


def symmetric(inputs: Tensor, labels: Tensor, rate: float, generator: torch.Generator) -> Tensor:
    """Replaces exactly a share of the labels by another one at random."""
    chosen = torch.randperm(len(labels), generator=generator)[: int(rate * len(labels))]
    others = (labels[chosen] + torch.randint(1, CLASSES, chosen.shape, generator=generator)) % CLASSES
    return labels.index_put((chosen,), others)


def pair(inputs: Tensor, labels: Tensor, rate: float, generator: torch.Generator) -> Tensor:
    """Replaces labels by the next one, each with the same probability."""
    chosen = torch.rand(len(labels), generator=generator) < rate
    return torch.where(chosen, (labels + 1) % CLASSES, labels)


def instance(inputs: Tensor, labels: Tensor, rate: float, generator: torch.Generator) -> Tensor:
    """Replaces labels with a probability that depends on the example, by a label that does (Xia et al. 2020).

    Each example has its own probability of a wrong label, normal around the rate with a deviation of 0.1. Which one it
    is follows from a random projection of the example, one for each class: its logits have a deviation of 4.
    """
    probability = torch.empty(len(labels)).normal_(rate, 0.1, generator=generator)
    directions = torch.empty(CLASSES, inputs[0].numel(), CLASSES).normal_(0.0, 4.0, generator=generator)
    logits = torch.einsum("ni,nic->nc", F.normalize(inputs.flatten(1)), directions[labels])
    logits = logits.scatter(1, labels.unsqueeze(1), -math.inf)
    others = torch.multinomial(logits.softmax(1), 1, generator=generator).squeeze(1)
    return torch.where(torch.rand(len(labels), generator=generator) < probability, others, labels)


NOISES: dict[str, Callable[[Tensor, Tensor, float, torch.Generator], Tensor]] = {
    "symmetric": symmetric,
    "pair": pair,
    "instance": instance,
}


def images() -> Examples:
    """Returns 5,000 images of MNIST, pixels from 0 to 1."""
    pixels, digits = mnist_5k()
    return pixels / 255, digits


DATASETS: dict[str, Callable[[], Examples]] = {"MNIST": images, "sentences": sentences_5k}


def load_data(dataset: str, noise: str, rate: float, seed: int) -> Data:
    """Returns a random split of a data set, with wrong labels."""
    inputs, labels = DATASETS[dataset]()
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(inputs), generator=generator)
    sizes = [NOISY, CHECKED, HELD_OUT, len(inputs) - NOISY - CHECKED - HELD_OUT]
    noisy, checked, held_out, test = ((inputs[part], labels[part]) for part in torch.split(order, sizes))
    given = NOISES[noise](*noisy, rate, generator)
    return Data((noisy[0], given), checked, held_out, test, truth=noisy[1])


def image_net() -> nn.Module:
    """Returns a fresh convolutional network."""
    first, second = nn.Conv2d(1, 12, 5, stride=2), nn.Conv2d(12, 24, 5, stride=2)
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Flatten(), nn.Linear(384, CLASSES))


def make_net(inputs: Tensor) -> nn.Module:
    """Returns a fresh network for such inputs: a convolutional one for images, a perceptron for vectors."""
    if inputs.ndim == 4:
        return image_net()
    return nn.Sequential(nn.Linear(inputs.shape[1], 128), nn.ReLU(), nn.Linear(128, CLASSES))


@torch.no_grad()
def check(net: nn.Module, data: Data) -> tuple[float, float]:
    """Returns the loss on held-out examples and the accuracy on test examples."""
    inputs, labels = data.held_out
    return float(F.cross_entropy(net(inputs), labels)), accuracy(net, data.test)


class Learner(BilevelLightningModule, L.LightningModule):
    """A network, a weight for each training example, and how labels are confused; either can be left out.

    Args:
        data: The problem.
        weighted: Whether there are weights.
        transition: Matrix from which the transition starts, [10, 10]; None for none.
    """

    weights: SampleWeights
    transition: LabelTransition

    def __init__(self, data: Data, *, weighted: bool = True, transition: Tensor | None = None) -> None:
        super().__init__()
        self.net = make_net(data.noisy[0])
        self.has_weights, self.has_transition = weighted, transition is not None
        if weighted:
            self.register_hyperparameter("weights", SampleWeights(NOISY))
        if transition is not None:
            self.register_hyperparameter("transition", LabelTransition(CLASSES, initial=transition))

    def inner_loss(self, batch: Any) -> Tensor:
        """Returns the weighted loss on given labels, which the network minimizes."""
        inputs, labels, index = batch
        logits = self.net(inputs)
        if self.has_transition:
            logits = self.transition(logits)
        losses = F.cross_entropy(self.mark_outputs(logits), labels, reduction="none")
        return (self.weights(index) * losses).mean() if self.has_weights else losses.mean()

    def outer_loss(self, batch: Any) -> Tensor:
        """Returns the loss on checked labels, which weights and transition minimize."""
        inputs, labels = batch
        return F.cross_entropy(self.net(inputs), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Returns the optimizer of the network."""
        return torch.optim.SGD(self.inner_parameters(), lr=LEARNING_RATE)

    def configure_hyper_optimizer(self) -> torch.optim.Optimizer:
        """Returns the optimizer of weights and transition, each with its own rate."""
        rates = {"weights": WEIGHT_RATE, "transition": TRANSITION_RATE}
        modules = {name: getattr(self, name) for name in rates if hasattr(self, name)}
        return torch.optim.Adam([{"params": list(m.parameters()), "lr": rates[name]} for name, m in modules.items()])


class Learned(NamedTuple):
    """What a run has learned: the transition [10, 10], and weights [3000] if there were any."""

    transition: Tensor
    weights: Tensor | None


def learn(data: Data, seed: int, steps: int, *, transition: Tensor, weighted: bool = True, **options: Any) -> Learned:
    """Learns weights and transition, or only the latter, in a single run; options are those of the Trainer."""
    torch.manual_seed(seed)
    learner = Learner(data, weighted=weighted, transition=transition)
    hypergradient = IFTHypergradient(
        every_n_batches=HYPER_EVERY,
        start_after_batches=WARM_UP,
        outer_dataloader=DataLoader(TensorDataset(*data.checked), batch_size=CHECKED),
    )
    trainer = quiet_trainer([hypergradient, *options.pop("callbacks", [])], **options)
    batches = random_batches(IndexedDataset(TensorDataset(*data.noisy)), BATCH_SIZE, steps, seed + 1)
    trainer.fit(learner, batches)
    weights = learner.weights.natural_values() if weighted else None
    return Learned(learner.transition.natural_values(), weights)
