"""What a learned augmentation costs with a ResNet-18 and images of 32 × 32 pixels, in units of a plain iteration.

In one run, stretches of plain iterations take turns with stretches of augmented ones, which end with a hyper step, so
that other load on the machine slows all of them alike. What is measured is processor time. Weights and images are
random: they cost the same.

Two sums are reported for a hyper step every n iterations: the mean iteration while the augmentation is tuned, which
Lorraine, Vicol, Duvenaud (2019) put at 3, and that of a whole run as in `learned_augmentation`, which tunes for the
first 60 % and keeps the augmentation, for which they have 2.

    python -m examples.experiments.augmentation_cost                 # three minutes on two cores
    python -m examples.experiments.augmentation_cost --batch-size 16 --rounds 10
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import lightning as L
import torch
import torchvision  # type: ignore[import-untyped]
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from examples.experiments.common import (
    Figures,
    Results,
    conclude,
    make_parser,
    markdown,
    quiet_trainer,
    random_batches,
    start,
)
from examples.experiments.problems.augmentation import TUNED, Classifier
from lightning_ifthpo import IFTHypergradient
from lightning_ifthpo.hyperparameters import AugmentationNetwork, RandomDistortion

NAME = "augmentation_cost"
STRETCH = 2  # iterations of the same kind
EVERY = (5, 10, 15)  # iterations between two hyper steps
AUGMENTATIONS: dict[str, Callable[[], nn.Module]] = {
    "U-Net": lambda: AugmentationNetwork(3),
    "distribution": RandomDistortion,
}


def resnet18() -> nn.Module:
    """Returns a ResNet-18 for small images: its first convolution keeps the resolution."""
    net: nn.Module = torchvision.models.resnet18(num_classes=10)
    net.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    net.maxpool = nn.Identity()
    return net


class Stopwatch(Callback):
    """Notes when batches start, and turns the augmentation on and off in turns of `STRETCH` batches."""

    def __init__(self) -> None:
        self.starts: list[float] = []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Notes the time; in eval mode images stay as they are."""
        pl_module.augment.train(batch_idx // STRETCH % 2 == 0)
        self.starts.append(time.process_time())


def seconds(augment: nn.Module, rounds: int, batch_size: int) -> list[list[float]]:
    """Returns how long each iteration takes, in stretches: plain and augmented ones take turns, in this order."""
    torch.manual_seed(0)
    examples, outer = (
        TensorDataset(torch.rand(4 * batch_size, 3, 32, 32), torch.randint(10, (4 * batch_size,))) for _ in range(2)
    )
    steps = STRETCH * (2 * rounds + 1) + 1  # the first stretch warms up, and the start of one more ends the last
    classifier = Classifier(resnet18(), augment, steps, hyper_rate=0.01, hyper_steps=rounds)
    hypergradient = IFTHypergradient(
        2 * STRETCH,
        start_after_batches=STRETCH,  # so that the hyper steps end the third stretch, the fifth, ...
        outer_dataloader=DataLoader(outer, batch_size),
        on_failure="use",
    )
    stopwatch = Stopwatch()
    quiet_trainer([stopwatch, hypergradient]).fit(classifier, random_batches(examples, batch_size, steps, seed=0))
    iterations = [end - start for start, end in itertools.pairwise(stopwatch.starts)]
    return [iterations[first : first + STRETCH] for first in range(STRETCH, len(iterations), STRETCH)]


def summary(results: Results) -> dict[str, float]:
    """Returns the cost of an iteration and of a run, for a hyper step every n iterations."""
    figures = {}
    for name, cost in results["costs"].items():
        for every in EVERY:
            figures[f"{name}, iteration, every {every}"] = round(cost["augmented"] + cost["hyper"] / every, 2)
            figures[f"{name}, run, every {every}"] = round(cost["augmented"] + TUNED * cost["hyper"] / every, 2)
    return figures


def table(results: Results) -> str:
    """Returns the costs of all augmentations."""
    figures = summary(results)
    rows = []
    for name, cost in results["costs"].items():
        sums = (f"{figures[f'{name}, {unit}, every {every}']:.1f}" for every in EVERY for unit in ("iteration", "run"))
        rows.append([name, f"{cost['augmented']:.2f}", f"{cost['hyper']:.1f}", *sums])
    titles = (f"every {every}: {unit}" for every in EVERY for unit in ("iteration", "run"))
    return markdown(["", "augmented iteration", "hyper step", *titles], rows)


def main(argv: list[str] | None = None) -> Figures:
    """Measures each augmentation; returns what the last line says."""
    parser = make_parser(__doc__)
    parser.add_argument("--augmentations", nargs="+", choices=list(AUGMENTATIONS), default=list(AUGMENTATIONS))
    parser.add_argument("--rounds", type=int, default=3, help="hyper steps that are timed")
    parser.add_argument("--batch-size", type=int, default=64)
    args = parser.parse_args(argv)
    start()
    costs = {}
    for name in args.augmentations:
        stretches = seconds(AUGMENTATIONS[name](), args.rounds, args.batch_size)
        plain = median(itertools.chain(*stretches[0::2]))
        augmented = median(itertools.chain(*(stretch[:-1] for stretch in stretches[1::2]))) / plain
        hyper = median(stretch[-1] for stretch in stretches[1::2]) / plain - augmented
        costs[name] = {"plain seconds": round(plain, 4), "augmented": round(augmented, 4), "hyper": round(hyper, 4)}
    return conclude(NAME, {"costs": costs}, args, summary=summary, table=table)


if __name__ == "__main__":
    main()
