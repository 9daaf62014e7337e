"""Training runs at the edge of stability: curvature grows until the optimizer is about to diverge, and stays there.

A small network learns a thousand handwritten digits by full-batch gradient descent, then by Adam. `SharpnessMonitor`
logs the largest eigenvalue of the Hessian, in the metric of the optimizer, and the value at which that optimizer
becomes unstable: 2/η for gradient descent, 38/η for Adam with β₁ = 0.9. Their ratio comes to one and stays there (Cohen
et al. 2021, "Gradient descent on neural networks typically occurs at the edge of stability"; 2022 for Adam).

Run:
    python examples/edge_of_stability.py            # some twenty seconds on two cores
"""

from __future__ import annotations

import argparse
import csv
import json
import logging
import warnings
from pathlib import Path
from statistics import mean, median
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_ifthpo import SharpnessMonitor
from lightning_ifthpo.plots import plot_sharpness

IMAGES = 1000
EVERY = 10  # steps between two measurements
OPTIMIZERS: dict[str, tuple[str, type[torch.optim.Optimizer], float, int]] = {
    "gradient_descent": ("gradient descent, edge 2/η", torch.optim.SGD, 0.2, 3000),
    "adam": ("Adam, edge 38/η", torch.optim.Adam, 3e-3, 1500),
}


class Classifier(L.LightningModule):
    """A tanh network with squared error: with cross-entropy, curvature falls before it reaches the edge."""

    def __init__(self, optimizer: type[torch.optim.Optimizer], lr: float) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 50), nn.Tanh(), nn.Linear(50, 50), nn.Tanh(), nn.Linear(50, 10))
        self.optimizer, self.lr = optimizer, lr

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Returns the squared error, summed over classes, halved."""
        images, digits = batch
        loss: Tensor = (self.net(images) - F.one_hot(digits, 10)).square().sum(1).mean() / 2
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        """Returns the optimizer in question."""
        return self.optimizer(self.parameters(), lr=self.lr)  # type: ignore[call-arg]


def train(name: str, steps: int, folder: Path) -> Path:
    """Trains with one optimizer and returns the log."""
    _, optimizer, lr, _ = OPTIMIZERS[name]
    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels[:IMAGES], dtype=torch.float32) / 16
    everything = (images - images.mean(0), torch.tensor(labels[:IMAGES]))
    torch.manual_seed(0)
    logger = CSVLogger(folder, name=name)
    trainer = L.Trainer(
        accelerator="cpu",  # the network is too small for anything else
        max_epochs=1,
        callbacks=[SharpnessMonitor(every_n_batches=EVERY, max_overhead=None)],
        logger=logger,
        log_every_n_steps=EVERY,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(Classifier(optimizer, lr), DataLoader([everything] * steps, batch_size=None))  # type: ignore[arg-type]
    return Path(logger.log_dir) / "metrics.csv"


def column(log: Path, name: str) -> list[float]:
    """Returns what was logged under a name."""
    with log.open(encoding="utf-8", newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


def main(argv: list[str] | None = None) -> dict[str, dict[str, float]]:
    """Trains with both optimizers; returns what the last line says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--fraction", type=float, default=1.0, help="of the training steps, to look only at the start")
    parser.add_argument("--output", type=Path, default=Path("results"), help="folder for the picture and the logs")
    args = parser.parse_args(argv)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for advice in ("does not have many workers", r"`isinstance\(treespec, LeafSpec\)`"):
        warnings.filterwarnings("ignore", f".*{advice}")
    torch.set_num_threads(1)  # at this size a second brings nothing, and on a busy machine it costs much

    figure = Figure(figsize=(10, 4), layout="constrained")
    figures = {}
    for axes, (name, (title, _, lr, steps)) in zip(figure.subplots(1, 2), OPTIMIZERS.items(), strict=True):
        log = train(name, max(round(steps * args.fraction), 4 * EVERY), args.output / "edge_of_stability")
        ratios = column(log, "sharpness/edge_ratio")
        settled = ratios[-len(ratios) // 4 :]
        print(
            f"{name:17} η = {lr:g}: λ_max over the edge, mean of the last quarter {mean(settled):.3f} "
            f"(from {min(settled):.3f} to {max(settled):.3f}; expected: 1), "
            f"{median(column(log, 'sharpness/products')):.0f} products a measurement"
        )
        figures[name] = {"measured": round(mean(settled), 4), "expected": 1.0}
        plot_sharpness(log, axes).set_title(title)
    picture = args.output / "edge_of_stability.png"
    figure.savefig(picture, dpi=110)
    print(f"The picture: {picture}")
    print(json.dumps(figures))
    return figures


if __name__ == "__main__":
    main()
