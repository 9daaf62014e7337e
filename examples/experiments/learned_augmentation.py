"""Learned data augmentation: a distribution, a displacement network and a U-Net, tuned while a network trains.

Three augmentations are learned, each in a single `trainer.fit` (Lorraine, Vicol, Duvenaud 2019, Fig. 7 of the talk):

- distribution: `RandomDistortion` draws rotation, scale, shear, translation, elastic displacement and noise for each
  image from normal distributions; their six standard deviations are the hyperparameters, and a seventh moves all six;
- displacement: a network draws a smooth displacement field for each image;
- U-Net: a network adds to the pixels, as in the talk.

A small network is trained on 300 MNIST images, and 400 others tell, through the outer loss, how the 300 should be
changed. All rows of the table have the same network, first weights, number of steps and schedule. The outer images have
labels too, so there are rows that train on all 700. All settings were chosen by the validation images of other splits:
the distribution's and the hand-set ones by `--validation --seeds 10 11 12 13 14 15 16 17 18 19`, the others by three to
five of these; test labels decide nothing. What 275 hyper steps learn varies from seed to seed, and ends a little below
hand-set strengths that a grid has chosen; in a new run, on all 700 labels, both reach the same accuracy. On other data
sets nothing was measured.

    python -m examples.experiments.learned_augmentation                                 # three minutes on two cores
    python -m examples.experiments.learned_augmentation --seeds 0 1 2 --controls        # the table
    python -m examples.experiments.learned_augmentation --dataset cifar10 --root data --download --steps 20000
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from textwrap import fill
from typing import Any, NamedTuple

import lightning as L
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from examples.experiments.common import (
    Examples,
    Figures,
    Results,
    add_data_arguments,
    conclude,
    from_hex,
    make_parser,
    markdown,
    mean,
    mnist_5k,
    number,
    quiet_trainer,
    random_batches,
    spread,
    start,
    to_hex,
    torchvision_data,
    values,
)
from examples.experiments.problems.augmentation import AUGMENTATIONS, TUNED, Classifier, network
from examples.experiments.style import OURS, PLAIN, dots, name_rows, page
from lightning_ifthpo import IFTHypergradient
from lightning_ifthpo.hyperparameters import RandomDistortion

NAME = "learned_augmentation"
TRAIN, OUTER, VALIDATION = 300, 400, 1000  # of 5,000 images; of other data sets a tenth each is outer and validation
STEPS = 1000
BATCH, OUTER_BATCH = 100, 400
WARM_UP = 50  # steps without hyper steps: an untrained network cannot tell a good change from a bad one
SAMPLES = 5  # in the picture


class Row(NamedTuple):
    """A training run.

    Attributes:
        meaning: What the table says.
        augmentation: Key of `AUGMENTATIONS`, or of an earlier row of `ROWS` that has learned one.
        hyper_rate: Learning rate of the augmentation's parameters; None leaves them as they are.
        hyper_every: Training steps between two hyper steps.
        all_labels: Whether the network is trained on the outer images as well.
    """

    meaning: str
    augmentation: str
    hyper_rate: float | None = None
    hyper_every: int = 5
    all_labels: bool = False


# The distribution is tuned in many small hyper steps. It validates at .969; without a part that all strengths share, at
# rate 0.05, it is .968, and strengths vary twice as much from seed to seed. A horizon of 300 steps reaches .970, with
# hyper steps on every batch too. Of the rates 0.003, 0.01 and 0.03 the displacement network validates best at 0.01,
# where the U-Net is better than at 0.03.
ROWS = {
    "none": Row("no augmentation", "identity"),
    "none_700": Row("no augmentation, all 700 labels", "identity", all_labels=True),
    "hand": Row("best hand-set strengths of a grid", "hand-set"),
    "unet": Row("U-Net, learned (starts as none)", "U-Net", hyper_rate=0.01),
    "displacement_start": Row("displacement network, untrained", "displacements"),
    "displacement": Row("displacement network, learned", "displacements", hyper_rate=0.01),
    "distribution_start": Row("distribution, untrained", "distortions"),
    "distribution": Row("distribution, learned", "distortions", hyper_rate=0.02, hyper_every=2),
    "hand_700": Row("hand-set, all 700 labels", "hand-set", all_labels=True),
    "distribution_700": Row("learned distribution, all 700 labels", "distribution", all_labels=True),
}
CONTROLS = ("hand_700", "distribution_700")  # rows that the default leaves out


class Split(NamedTuple):
    """Images [N, C, H, W] with labels [N]."""

    train: Examples
    outer: Examples
    validation: Examples
    test: Examples


def load_data(name: str, seed: int, root: Path, download: bool) -> Split:
    """Returns a data set, split at random, with pixels from 0 to 1."""
    generator = torch.Generator().manual_seed(seed)
    if name == "mnist5k":
        images, labels = mnist_5k()
        sizes, test = [TRAIN, OUTER, VALIDATION, len(labels) - TRAIN - OUTER - VALIDATION], None
    else:
        (images, labels), test = torchvision_data(name, root, download)
        tenth = len(labels) // 10
        sizes = [len(labels) - 2 * tenth, tenth, tenth]
    parts = torch.split(torch.randperm(len(labels), generator=generator), sizes)
    examples = [(images[part], labels[part]) for part in parts] + ([] if test is None else [test])
    return Split(*((x.float() / 255, y) for x, y in examples))


class EarlyHypergradient(IFTHypergradient):
    """Makes no hyper steps after `stop` training steps.

    Args:
        outer_dataloader: Outer batches.
        every: Training steps between two hyper steps.
        stop: The number of training steps.
    """

    def __init__(self, outer_dataloader: DataLoader[Any], every: int, stop: int) -> None:
        super().__init__(every, start_after_batches=WARM_UP, outer_dataloader=outer_dataloader)
        self.stop = stop

    def on_train_batch_end(self, trainer: L.Trainer, *details: Any) -> None:
        """Makes a hyper step when one is due."""
        if trainer.global_step <= self.stop:
            super().on_train_batch_end(trainer, *details)


def train(row: Row, augment: nn.Module, split: Split, options: argparse.Namespace, seed: int) -> float:
    """Trains a fresh network, tunes the augmentation where the row says so, and returns the accuracy."""
    torch.manual_seed(seed)  # the same first weights in all rows
    images, labels = (torch.cat(parts) for parts in zip(split.train, split.outer, strict=True))
    net = network(images.shape[1], int(labels.max()) + 1)
    stop = int(TUNED * options.steps)
    classifier = Classifier(net, augment, options.steps, row.hyper_rate, (stop - WARM_UP) // row.hyper_every)
    outer = DataLoader(TensorDataset(*split.outer), OUTER_BATCH, shuffle=True)
    trainer = quiet_trainer([] if row.hyper_rate is None else [EarlyHypergradient(outer, row.hyper_every, stop)])
    dataset = TensorDataset(*((images, labels) if row.all_labels else split.train))
    trainer.fit(classifier, random_batches(dataset, BATCH, options.steps, seed))
    scored = split.validation if options.validation else split.test
    (metrics,) = trainer.test(classifier, DataLoader(TensorDataset(*scored), 500), verbose=False)
    return metrics["accuracy"]


def compare(split: Split, options: argparse.Namespace, seed: int) -> tuple[dict[str, float], dict[str, nn.Module]]:
    """Returns the accuracy and the final augmentation of each row."""
    accuracies: dict[str, float] = {}
    augmentations: dict[str, nn.Module] = {}
    for name in options.rows:
        row = ROWS[name]
        torch.manual_seed(seed)  # of the first weights of augmentations
        learned = augmentations.get(row.augmentation)
        augment = learned or AUGMENTATIONS[row.augmentation](split.train[0].shape[1])
        began = time.perf_counter()
        accuracies[name] = train(row, augment, split, options, seed)
        augmentations[name] = augment
        print(f"seed {seed}   {row.meaning:38}{accuracies[name]:.3f}{time.perf_counter() - began:8.1f} s", flush=True)
        if row.hyper_rate is not None and isinstance(augment, RandomDistortion):
            print("         ", *(f"{kind} {width:.3f}" for kind, width in augment.natural_values().items()), sep="  ")
    return accuracies, augmentations


@torch.no_grad()
def tiles(image: Tensor, augment: nn.Module) -> str:
    """Returns an image [C, H, W], what an augmentation makes of it, and the standard deviation of each pixel."""
    torch.manual_seed(0)  # the same random numbers in all rows
    versions = augment.train()(image.expand(500, *image.shape))
    # a pixel between 0 and 1 deviates by at most one half
    return to_hex(torch.stack([image, *versions[:SAMPLES], 2.0 * versions.std(0)]))


def summary(results: Results) -> dict[str, float]:
    """Returns mean accuracies."""
    return {name: mean(by_seed) for name, by_seed in results["scores"].items()}


def table(results: Results) -> str:
    """Returns accuracies before and after learning."""
    scores = results["scores"]
    rows = [[ROWS[name].meaning, spread(scores[name])] for name in ROWS if name in scores]
    return markdown(["300 images to train on", "test accuracy"], rows)


def draw(results: Results) -> Figure:
    """Returns what each row makes of an image, and its accuracies."""
    picture, scores = results["picture"], results["scores"]
    names = [name for name in ROWS if name in scores]
    learned = [name for name in names if ROWS[name].hyper_rate is not None] or names
    best = max(mean(scores[name]) for name in learned)
    figure = page(
        0.52 * len(names) + 1.2,
        f"Test accuracy reaches {number(best)} with an augmentation learned by hypergradients (blue);\n"
        f"{ROWS[names[0]].meaning}: {number(mean(scores[names[0]]))}",
    )
    grid = figure.add_gridspec(len(names), SAMPLES + 3, width_ratios=[1.0] * (SAMPLES + 2) + [4.0])
    panel = figure.add_subplot(grid[:, -1])
    name_rows(panel, [number(mean(scores[name])) for name in names])
    panel.yaxis.tick_right()
    titles = {0: "image", 1: f"{SAMPLES} versions", SAMPLES + 1: "spread"}
    for place, name in enumerate(names):
        images = from_hex(picture["tiles"][name], (SAMPLES + 2, *picture["shape"]))
        for column, tile in enumerate(images):
            axes = figure.add_subplot(grid[place, column])
            axes.imshow(tile.permute(1, 2, 0).numpy(), vmin=0.0, vmax=1.0)
            axes.set(xticks=[], yticks=[])
            if column == 0:
                label = fill(ROWS[name].meaning, 21)
                axes.set_ylabel(label, rotation=0, ha="right", va="center", fontsize="small")
            if place == 0:
                axes.set_title(titles.get(column, ""))
        dots(panel, place, values(scores[name]), PLAIN if ROWS[name].hyper_rate is None else OURS)
    panel.set(title="Accuracy: seeds and mean", xlabel="test accuracy")
    return figure


def main(argv: list[str] | None = None) -> Figures:
    """Compares the rows on each seed; returns what the last line says."""
    parser = make_parser(__doc__, seeds=[0])
    add_data_arguments(parser)
    parser.add_argument("--steps", type=int, default=STEPS, help="of each run")
    default = [name for name in ROWS if name not in CONTROLS]
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=default)
    parser.add_argument("--controls", dest="rows", action="store_const", const=list(ROWS), help="all rows")
    parser.add_argument("--validation", action="store_true", help="score on validation images, to choose settings")
    args = parser.parse_args(argv)
    for name in args.rows:
        source = ROWS[name].augmentation
        if source not in (*AUGMENTATIONS, *args.rows[: args.rows.index(name)]):
            parser.error(f"{name} uses what {source} has learned; name that before it")
    start()
    scores: dict[str, dict[str, float]] = {name: {} for name in args.rows}
    picture: Results = {}
    for seed in args.seeds:
        split = load_data(args.dataset, seed, args.root, args.download)
        accuracies, augmentations = compare(split, args, seed)
        for name, accuracy in accuracies.items():
            scores[name][str(seed)] = accuracy
        if not picture:
            image = split.train[0][0]
            shown = {name: tiles(image, augment) for name, augment in augmentations.items()}
            picture = {"shape": list(image.shape), "tiles": shown}
    results = {"scores": scores, "picture": picture}
    known = args.dataset == "mnist5k" and not args.validation
    return conclude(NAME, results, args, summary=summary, table=table, draw=draw, comparable=known)


if __name__ == "__main__":
    main()
