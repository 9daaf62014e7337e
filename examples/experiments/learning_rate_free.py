"""A learning rate that nobody set: `ExactGeN`, the best rates of a grid, AutoGeN and Prodigy.

A perceptron learns digits, and with `--full` 4,000 images of MNIST too, as does a network of convolutions with
BatchNorm, for 20 epochs by SGD, SGD with momentum and AdamW. `ExactGeN` is given rates between 1e-6 and 1, and does not
use them. A constant rate and a cosine schedule need a run for each rate of a grid. The best of these is chosen by test
accuracy, which nobody could do in practice, so the comparison favours them. AutoGeN (`pip install gen-optim`) and
Prodigy (`pip install prodigyopt`, with the cosine schedule that its authors recommend) take part where installed.

    python -m examples.experiments.learning_rate_free                       # digits, one seed: half a minute
    python -m examples.experiments.learning_rate_free --full --seeds 0 1 2  # all data: half an hour on one core
    python -m examples.experiments.learning_rate_free --full --seeds 0 1 2 --methods ExactGeN  # the others as recorded
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from examples.experiments.common import (
    Figures,
    Results,
    accuracy,
    conclude,
    deviation,
    digits_8x8,
    installed,
    make_parser,
    markdown,
    mean,
    mnist_5k,
    quiet_trainer,
    read,
    spread,
    start,
    values,
)
from examples.experiments.problems.auto_gen import AutoGeN
from examples.experiments.style import BOUND, OTHER, OURS, PLAIN, Role, name_rows, page
from lightning_ifthpo import ExactGeN

NAME = "learning_rate_free"
EPOCHS, BATCH, HIDDEN = 20, 100, 64
RECORDED_SEEDS = [0, 1, 2]
STARTS = (1e-6, 1e-4, 1e-2, 1.0)
Method = Literal["constant", "cosine", "ExactGeN", "AutoGeN", "Prodigy"]
NETS: dict[str, Callable[[], nn.Module]] = {
    "digits": lambda: perceptron(64),
    "MNIST": lambda: perceptron(784),
    "convolutions": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 28, 28)),
        *(nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(16 * 49, 10)),
    ),
}
GRIDS: dict[str, tuple[float, ...]] = {
    "SGD": (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.85, 1.0),
    "momentum": (0.03, 0.05, 0.07, 0.1, 0.14, 0.2, 0.25, 0.3, 0.4),
    "AdamW": (1e-3, 2e-3, 3e-3, 5e-3, 7e-3, 1e-2, 1.4e-2, 2e-2, 3e-2),
}
PACKAGES = {"AutoGeN": "GeN", "Prodigy": "prodigyopt"}


class Entrant(NamedTuple):
    """How a method is named and drawn, and whether only the best of the rates that it is given counts."""

    title: str
    role: Role
    is_filled: bool
    needs_rate: bool

    def points(self, **others: Any) -> dict[str, Any]:
        """Returns arguments of `Axes.plot`."""
        face = {} if self.is_filled else {"markerfacecolor": "white", "markeredgewidth": 1.3}
        return self.role.points(**face, **others)


METHODS: dict[Method, Entrant] = {
    "constant": Entrant("constant rate", PLAIN, is_filled=True, needs_rate=True),
    "cosine": Entrant("cosine", PLAIN, is_filled=False, needs_rate=True),
    "AutoGeN": Entrant("AutoGeN", OTHER, is_filled=True, needs_rate=False),
    "Prodigy": Entrant("Prodigy", OTHER, is_filled=False, needs_rate=True),
    "ExactGeN": Entrant("`ExactGeN`", OURS, is_filled=True, needs_rate=False),
}


def perceptron(inputs: int) -> nn.Module:
    """Returns one with two hidden layers."""
    return nn.Sequential(
        nn.Linear(inputs, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 10)
    )


class Classifier(L.LightningModule):
    """A network, an optimizer and maybe a schedule.

    Args:
        net: The network.
        optimizer: "SGD", "momentum", "AdamW" or "Prodigy".
        lr: Learning rate that the optimizer is made with.
        cosine: Lower it to zero along a cosine.
    """

    def __init__(self, net: nn.Module, optimizer: str, lr: float, *, cosine: bool) -> None:
        super().__init__()
        self.net, self.optimizer, self.lr, self.cosine = net, optimizer, lr, cosine

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Returns the cross-entropy."""
        images, labels = batch
        return F.cross_entropy(self.net(images), labels)

    def configure_optimizers(self) -> Any:
        """Returns the optimizer in question."""
        if not self.cosine:
            return self._optimizer()
        optimizer = self._optimizer()
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _optimizer(self) -> torch.optim.Optimizer:
        if self.optimizer == "Prodigy":
            prodigy: Any = importlib.import_module("prodigyopt")
            optimizer: torch.optim.Optimizer = prodigy.Prodigy(self.parameters(), lr=1.0, weight_decay=0.01)
            return optimizer
        if self.optimizer == "AdamW":
            return torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.01)
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9 if self.optimizer == "momentum" else 0.0)


class Rates(Callback):
    """Notes the learning rate of each step."""

    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, *arguments: Any) -> None:
        """Notes one."""
        self.rates.append(float(trainer.optimizers[0].param_groups[0]["lr"]))


class Data:
    """Images of a data set, a fixed part of them for testing, and a network for them."""

    def __init__(self, name: str) -> None:
        pixels, labels = digits_8x8() if name == "digits" else mnist_5k()
        images = pixels if name == "digits" else pixels.flatten(1) / 255
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(123))
        images, labels = images[order], labels[order]
        cut = 1400 if name == "digits" else 4000
        self.net = NETS[name]
        self.training = TensorDataset(images[:cut], labels[:cut])
        self.test = images[cut:], labels[cut:]

    def train(self, method: Method, optimizer: str, lr: float, seed: int) -> tuple[float, list[float]]:
        """Returns test accuracy in percent, and the rates."""
        torch.manual_seed(seed)
        module = Classifier(self.net(), optimizer, lr, cosine=method in ("cosine", "Prodigy"))
        rates = Rates()
        callbacks: dict[str, list[Callback]] = {"ExactGeN": [ExactGeN()], "AutoGeN": [AutoGeN(F.cross_entropy)]}
        trainer = quiet_trainer([*callbacks.get(method, []), rates], max_epochs=EPOCHS)
        generator = torch.Generator().manual_seed(seed)
        trainer.fit(module, DataLoader(self.training, BATCH, shuffle=True, generator=generator))
        return 100 * accuracy(module.net.eval(), self.test), rates.rates

    def accuracies(self, method: Method, optimizer: str, rates: tuple[float, ...], seeds: list[int]) -> Results:
        """Returns the accuracy of each seed for each rate."""
        by_rate: Results = {f"{lr:g}": {} for lr in rates}
        for lr in rates:
            for seed in seeds:
                by_rate[f"{lr:g}"][str(seed)] = round(self.train(method, optimizer, lr, seed)[0], 3)
        return by_rate


def pooled(by_rate: Results) -> dict[str, float]:
    """Returns the accuracies of all rates and seeds under one number each."""
    accuracies = [accuracy for by_seed in by_rate.values() for accuracy in values(by_seed)]
    return {str(place): accuracy for place, accuracy in enumerate(accuracies)}


def best(by_rate: Results) -> tuple[float, dict[str, float]]:
    """Returns the rate with the highest mean accuracy, and its accuracies."""
    lr = max(by_rate, key=lambda rate: mean(by_rate[rate]))
    return float(lr), by_rate[lr]


def summary(results: Results) -> dict[str, float]:
    """Returns the accuracy with `ExactGeN` minus that of the best constant rate, in points."""
    return {name: round(difference(cell), 2) for name, cell in results["cells"].items()}


def difference(cell: Results) -> float:
    """Returns it for one cell."""
    return mean(pooled(cell["ExactGeN"])) - mean(best(cell["constant"])[1])


def table(results: Results) -> str:
    """Returns accuracies in percent; `ExactGeN` and AutoGeN over all rates they are given."""
    cells = results["cells"]
    shown = [method for method in METHODS if method != "ExactGeN" and any(method in cell for cell in cells.values())]
    rows = []
    for name, cell in cells.items():
        row = [name.replace("/", ", ")]
        for method in shown:
            row.append(spread(counted(cell, method), 1) if method in cell else "")
        rows.append([*row, spread(pooled(cell["ExactGeN"]), 1), f"{difference(cell):+.2f}".replace("-", "−")])
    return markdown(["", *(METHODS[method].title for method in shown), "`ExactGeN`", "minus constant"], rows)


def counted(cell: Results, method: Method) -> Results:
    """Returns the accuracies that count: those of the best rate, or of all for a method that should not need one."""
    return best(cell[method])[1] if METHODS[method].needs_rate else pooled(cell[method])


def draw(results: Results) -> Figure:
    """Returns the accuracies of the table, and the rates that `ExactGeN` chose."""
    cells = results["cells"]
    gaps = [difference(cell) for cell in cells.values()]
    figure = page(
        5.6,
        f"Without a learning rate, ExactGeN is between {min(gaps):+.1f} and {max(gaps):+.1f} points".replace("-", "−")
        + "\nfrom the best constant rate of a grid, which is chosen by test accuracy",
    )
    nets: dict[str, Results] = {}
    for name, cell in cells.items():
        net, optimizer = name.split("/")
        nets.setdefault(net, {})[optimizer] = cell
    panels = figure.subplots(2, len(nets), squeeze=False, sharey="row")
    for panel, (net, by_optimizer) in zip(panels[0], nets.items(), strict=True):
        draw_accuracies(panel, by_optimizer)
        panel.set(title=net, xlabel="test accuracy (%)")
    for panel, by_optimizer in zip(panels[1], nets.values(), strict=True):
        for dash, (optimizer, cell) in zip(("-", "--", ":"), by_optimizer.items(), strict=False):
            ratios = [rate / best(cell["constant"])[0] for rate in cell["rates"]]
            panel.semilogy(ratios, color=OURS.color, linestyle=dash, label=optimizer)
        panel.axhline(1.0, **BOUND.line(linewidth=1.0))
        panel.set(xlabel="step", ylim=(1e-3, 30.0))
        panel.legend(loc="lower center")
    panels[1, 0].set_ylabel("chosen rate over\nthe best constant one")
    entrants = {name: entrant for name, entrant in METHODS.items() if any(name in cell for cell in cells.values())}
    marks = [Line2D([], [], label=name, **entrant.points()) for name, entrant in entrants.items()]
    title = "mean and standard deviation over seeds; ExactGeN and AutoGeN: over all rates that they were given, too"
    figure.legend(handles=marks, loc="outside lower center", ncols=len(marks), title=title)
    return figure


def draw_accuracies(panel: Axes, cells: Results) -> None:
    """Draws a row for each optimizer, with a line for each method; an arrow points to what is far to the left."""
    name_rows(panel, list(cells))
    fair = [mean(counted(cell, method)) for cell in cells.values() for method in ("constant", "ExactGeN")]
    left = min(fair) - 2.5
    for row, cell in enumerate(cells.values()):
        panel.axhline(row + 0.5, color="#767676", linewidth=0.5)
        for place, (name, entrant) in enumerate(METHODS.items()):
            if name in cell:
                center, around = mean(counted(cell, name)), deviation(counted(cell, name))
                height = row + 0.17 * (place - 2)
                if center < left:
                    note = f"{center:.0f}" + ("" if around is None else f" ± {around:.0f}")
                    panel.plot(left + 0.15, height, **entrant.points(marker="<"))
                    panel.annotate(note, (left + 0.4, height), va="center", fontsize=8)
                else:
                    panel.errorbar(center, height, xerr=around, elinewidth=1.2, **entrant.points())
    panel.set_xlim(left=left)


def taking_part(optimizer: str, chosen: list[str], *, full: bool) -> list[Method]:
    """Returns the chosen methods that are installed and belong to an optimizer: Prodigy is an Adam."""
    usable = set(installed(chosen, PACKAGES)) & (set(METHODS) if full else {"constant", "ExactGeN"})
    return [name for name in METHODS if name in usable and (name != "Prodigy" or optimizer == "AdamW")]


def measured(data: Data, optimizer: str, methods: list[Method], seeds: list[int], *, full: bool) -> Results:
    """Returns the accuracies of some methods, and the rates that `ExactGeN` chose."""
    grid, starts = (GRIDS[optimizer], STARTS) if full else (GRIDS[optimizer][::3], STARTS[::3])
    given = {"constant": grid, "cosine": grid, "Prodigy": (1.0,)}
    cell: Results = {}
    for method in methods:
        made = "Prodigy" if method == "Prodigy" else optimizer
        cell[method] = data.accuracies(method, made, given.get(method, starts), seeds)
    if "ExactGeN" in methods:
        rates = data.train("ExactGeN", optimizer, starts[0], seeds[0])[1]
        cell["rates"] = [float(f"{rate:.3g}") for rate in rates]
    return cell


def main(argv: list[str] | None = None) -> Figures:
    """Runs all cells; returns what the last line says."""
    parser = make_parser(__doc__, seeds=[0])
    parser.add_argument("--full", action="store_true", help="all data sets, starts, competitors and fine grids")
    parser.add_argument("--optimizers", nargs="+", default=list(GRIDS), choices=list(GRIDS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    args = parser.parse_args(argv)
    start(ignore=["Covariance of the parameters"])  # in AutoGeN's fit
    recorded: Results = {} if set(args.methods) == set(METHODS) else read(NAME)["cells"]
    if recorded and (missing := sorted(set(args.methods) - set(installed(args.methods, PACKAGES)))):
        parser.error(f"not installed: {', '.join(missing)}")
    if recorded and not (args.full and args.seeds == RECORDED_SEEDS):
        parser.error(
            f"--methods needs --full --seeds {' '.join(map(str, RECORDED_SEEDS))}, as the others were recorded"
        )
    cells: Results = {}
    for name in list(NETS) if args.full else ["digits"]:
        data = Data(name)
        for optimizer in args.optimizers:
            methods = taking_part(optimizer, args.methods, full=args.full)
            cell = recorded.get(f"{name}/{optimizer}", {}) | measured(
                data, optimizer, methods, args.seeds, full=args.full
            )
            cells[f"{name}/{optimizer}"] = cell
            lr, constant = best(cell["constant"])
            print(f"{name}, {optimizer}: constant {spread(constant, 2)} at {lr:g}", end="")
            print(f"; ExactGeN {spread(pooled(cell['ExactGeN']), 2)}", flush=True)
    return conclude(NAME, {"cells": cells}, args, summary=summary, table=table, draw=draw)


if __name__ == "__main__":
    main()
