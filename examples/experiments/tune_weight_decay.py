"""Learned weight decay on 300 images of MNIST: a saving of training runs, not of error.

One run in which `IFTHypergradient` tunes a single decay ends where the best run of a grid ends, and so does one decay
per tensor. One decay per weight has 39,760 numbers to fit 300 outer images with, and fits them; test images gain
nothing from that. Training once more on all 600 images, at the single decay that was found, helps more than any of it.

Every method sees the same images: 300 to train on, and 300, the outer set, to choose decays by. All runs have the same
number of steps, and nothing is chosen by test images.

    python -m examples.experiments.tune_weight_decay              # a minute on two cores
    python -m examples.experiments.tune_weight_decay --seeds 0
"""

from __future__ import annotations

import time
from statistics import geometric_mean, median
from typing import Any, Literal, NamedTuple, TypeAlias

import lightning as L
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from examples.experiments.common import (
    Examples,
    Figures,
    Results,
    conclude,
    make_parser,
    markdown,
    mean,
    mnist_5k,
    number,
    quiet_trainer,
    random_batches,
    spread,
    start,
    values,
)
from examples.experiments.style import BOUND, OTHER, OURS, OUTER, TEST, dots, name_rows, page
from lightning_ifthpo import BilevelLightningModule, IFTHypergradient
from lightning_ifthpo.hyperparameters import WeightDecay

NAME = "tune_weight_decay"
Granularity: TypeAlias = Literal["global", "tensor", "weight"]
GRANULARITIES: tuple[Granularity, ...] = ("global", "tensor", "weight")

PARTS = [300, 300, 4400]  # training, outer, test
HIDDEN, BATCH, LR, MOMENTUM = 50, 100, 0.1, 0.9
GRID = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
START = 1e-4  # a hundred times too small
HYPER_EVERY = 5  # steps
# About the change of log decay per hyper step. With 0.05 and with 0.1 a single decay ends within 0.01 of the same outer
# loss, and so it does from any start on the grid.
HYPER_LR = 0.07
PATH_EVERY = 10  # steps, of the decays that the picture shows
TENSORS = ("weights of layer 1", "biases of layer 1", "weights of layer 2", "biases of layer 2")
METHODS = {
    "none": ("no decay", 1),
    "grid": (f"best single decay of a grid of {len(GRID)}", len(GRID)),
    "global": ("single decay, tuned by hypergradients", 1),
    "tensor": ("one decay per tensor, tuned", 1),
    "weight": ("one decay per weight, tuned", 1),
    "retrained": ("all 600 images, at the single decay that was tuned", 2),
}


class Classifier(BilevelLightningModule, L.LightningModule):
    """A small perceptron with weight decay, which stays as it is unless `IFTHypergradient` tunes it.

    Args:
        decay: Decay at the start; zero for none at all.
        granularity: Of the decay.
    """

    decay: WeightDecay | None

    def __init__(self, decay: float, granularity: Granularity) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(784, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 10))
        self.path: list[list[float]] = []  # the mean decay of each tensor, now and then
        if decay:
            self.register_hyperparameter("decay", WeightDecay(self.net, granularity, initial=decay, maximum=1.0))
        else:
            self.decay = None

    def inner_loss(self, batch: Examples) -> Tensor:
        """Returns what the weights minimize."""
        images, digits = batch
        loss = F.cross_entropy(self.mark_outputs(self.net(images)), digits)
        return loss if self.decay is None else loss + self.decay()

    def outer_loss(self, batch: Examples) -> Tensor:
        """Returns what the decays minimize."""
        images, digits = batch
        return F.cross_entropy(self.net(images), digits)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Returns the optimizer of the weights."""
        return torch.optim.SGD(self.inner_parameters(), lr=LR, momentum=MOMENTUM)

    def configure_hyper_optimizer(self) -> torch.optim.Optimizer:
        """Returns the optimizer of the decays."""
        return torch.optim.Adam(self.hyperparameters(), lr=HYPER_LR)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Notes the decays after the hyper step, because hooks of callbacks run before those of the module."""
        if self.decay is not None and (batch_idx + 1) % PATH_EVERY == 0:
            values = self.decay.natural_values()
            decays = list(values.values()) if isinstance(values, dict) else [values]
            self.path.append([float(decay.mean()) for decay in decays])


class Run(NamedTuple):
    """What came of a training run."""

    outer: tuple[float, float]  # cross-entropy and accuracy
    test: tuple[float, float]
    path: list[list[float]]  # for each step that was noted, the mean decay of each tensor
    seconds: float


class Split(NamedTuple):
    """Images and their digits, split at random."""

    training: Examples
    outer: Examples
    test: Examples
    seed: int

    def train(self, steps: int, decay: float, tuned: Granularity | None = None, *, both: bool = False) -> Run:
        """Trains a network. The seed sets its first weights and the order of batches, whatever the method.

        Args:
            steps: Number of training steps.
            decay: At the start; zero for none.
            tuned: Granularity of the decays to tune; None keeps the single one.
            both: Whether to train on the outer set too.
        """
        torch.manual_seed(self.seed)
        module = Classifier(decay, tuned or "global")
        parts = zip(self.training, self.outer, strict=True)
        dataset = TensorDataset(*map(torch.cat, parts)) if both else TensorDataset(*self.training)
        trainer = quiet_trainer([IFTHypergradient(HYPER_EVERY, outer_dataloader=[self.outer])] if tuned else [])
        began = time.perf_counter()
        trainer.fit(module, random_batches(dataset, BATCH, steps, self.seed))
        seconds = time.perf_counter() - began
        return Run(score(module.net, self.outer), score(module.net, self.test), module.path, seconds)


@torch.no_grad()
def score(net: nn.Module, examples: Examples) -> tuple[float, float]:
    """Returns cross-entropy and accuracy."""
    images, digits = examples
    logits = net(images)
    return float(F.cross_entropy(logits, digits)), float((logits.argmax(1) == digits).float().mean())


def split(seed: int) -> Split:
    """Returns a split of the 5,000 images."""
    pixels, digits = mnist_5k()
    images = pixels.flatten(1) / 255
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    training, outer, test = ((images[part], digits[part]) for part in torch.split(order, PARTS))
    return Split(training, outer, test, seed)


def run(seeds: list[int], steps: int) -> Results:
    """Trains with every method for each seed."""
    results: Results = {}

    def note(seed: int, name: str, run: Run) -> None:
        entry = results.setdefault(name, {part: {} for part in ("test", "outer", "losses", "seconds", "path")})
        for part, value in (("test", run.test[1]), ("outer", run.outer[1]), ("seconds", round(run.seconds, 2))):
            entry[part][str(seed)] = value
        entry["losses"][str(seed)] = {"test": run.test[0], "outer": run.outer[0]}
        entry["path"][str(seed)] = [[float(f"{decay:.3g}") for decay in decays] for decays in run.path]

    for seed in seeds:
        data = split(seed)
        note(seed, "none", data.train(steps, 0.0))
        grid = [data.train(steps, decay) for decay in GRID]
        for decay, point in zip(GRID, grid, strict=True):
            note(seed, f"grid {decay:g}", point._replace(path=[]))
        best = min(grid, key=lambda point: point.outer[0])
        note(seed, "grid", best._replace(seconds=sum(point.seconds for point in grid), path=[]))
        for granularity in GRANULARITIES:
            tuned = data.train(steps, START, granularity)
            note(seed, granularity, tuned)
            if granularity == "global":
                single = tuned
        again = data.train(steps, single.path[-1][0], both=True)
        note(seed, "retrained", again._replace(seconds=again.seconds + single.seconds, path=[]))
        accuracies = (f"{name} {results[name]['test'][str(seed)]:.3f}" for name in METHODS)
        print(f"seed {seed}", *accuracies, sep="   ", flush=True)
    return results


def summary(results: Results) -> dict[str, float]:
    """Returns mean test accuracies."""
    return {name: mean(results[name]["test"]) for name in METHODS}


def table(results: Results) -> str:
    """Returns accuracies and costs."""
    rows = []
    for name, (meaning, runs) in METHODS.items():
        outer = "–" if name == "retrained" else number(mean(results[name]["outer"]))  # it trains on them
        plain = values(results["none"]["seconds"])
        pairs = zip(values(results[name]["seconds"]), plain, strict=True)
        time = f"{median(mine / other for mine, other in pairs):.1f}" if plain else ""
        rows.append([meaning, str(runs), time, spread(results[name]["test"]), outer])
    return markdown(["", "training runs", "time", "test accuracy", "accuracy on the outer images"], rows)


def draw(results: Results) -> Figure:
    """Returns where tuned decays end on the curve of the grid, and what each method makes of the two sets."""
    paths = torch.tensor(list(results["global"]["path"].values()))[..., 0]  # [seeds, looks]
    steps = [PATH_EVERY * (place + 1) for place in range(paths.shape[1])]
    end = geometric_mean(paths[:, -1].tolist())
    best = min(GRID, key=lambda decay: mean_loss(results, f"grid {decay:g}", "outer"))
    headline = f"Weight decay: one tuned run ends at {end:.2g}; the best of a grid of {len(GRID)} runs is {best:g}"
    figure = page(5.6, headline)
    axes = figure.subplot_mosaic([["grid", "scores"], ["path", "tensors"]])
    name_rows(axes["scores"], list(METHODS))
    for part, role, shift in (("test", TEST, -0.17), ("outer", OUTER, 0.17)):
        curve = [mean_loss(results, f"grid {decay:g}", part) for decay in GRID]
        axes["grid"].plot(GRID, curve, **role.line(marker=role.marker, label=f"grid, {part} images"))
        loss = mean_loss(results, "global", part)
        label = "tuned, both" if part == "outer" else None
        axes["grid"].plot(end, loss, "*", color="white", mec=OURS.color, mew=1.5, markersize=13, label=label)
        for row, name in enumerate(METHODS):
            if (name, part) != ("retrained", "outer"):  # it trains on them
                label = f"{part} images" if row == 0 else None
                dots(axes["scores"], row + shift, values(results[name][part]), role, label)
    axes["grid"].set(title="The grid, and where the tuned decay ends", ylabel="cross-entropy", xlabel="decay")
    axes["grid"].set_xscale("log")
    axes["scores"].set(title="Accuracy: a point for each seed, a bar for the mean", xlabel="accuracy")
    axes["path"].plot(steps, paths.T, **OURS.line())
    axes["path"].axhline(best, **BOUND.line(linewidth=1.2, label="best of the grid"))
    axes["path"].set(title="A single decay while it is tuned, each seed", ylabel="decay")
    first = zip(*next(iter(results["tensor"]["path"].values())), strict=True)
    looks = [(OURS.color, "-"), (OURS.color, ":"), (OTHER.color, "-."), (OTHER.color, "--")]
    for label, (color, dash), decays in zip(TENSORS, looks, first, strict=True):
        axes["tensors"].plot(steps, decays, color=color, linestyle=dash, label=label)
    axes["tensors"].set_title("One decay per tensor while tuned, first seed")
    for name in ("path", "tensors"):
        axes[name].set(yscale="log", xlabel="training step")
    for name in ("scores", "path", "tensors"):
        axes[name].legend()
    axes["grid"].legend(loc="upper right", bbox_to_anchor=(0.88, 1.03))  # between the ends of the curve
    return figure


def mean_loss(results: Results, name: str, part: str) -> float:
    """Returns a mean cross-entropy over seeds."""
    return mean({seed: losses[part] for seed, losses in results[name]["losses"].items()})


def main(argv: list[str] | None = None) -> Figures:
    """Runs everything for each seed; returns what the last line says."""
    parser = make_parser(__doc__, seeds=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=800, help=f"training steps of each run, at least {PATH_EVERY}")
    args = parser.parse_args(argv)
    start()
    return conclude(NAME, run(args.seeds, args.steps), args, summary=summary, table=table, draw=draw)


if __name__ == "__main__":
    main()
