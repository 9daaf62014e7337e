"""Training runs at the edge of stability: curvature grows until the optimizer is about to diverge, and stays there.

A small network learns a thousand handwritten digits by full-batch gradient descent, then by Adam. `SharpnessMonitor`
logs the largest eigenvalue of the Hessian, in the metric of the optimizer, and the value at which that optimizer
becomes unstable: 2/η for gradient descent, 38/η for Adam with β₁ = 0.9. Their ratio rises to one and stays there (Cohen
et al. 2021, "Gradient descent on neural networks typically occurs at the edge of stability"; 2022 for Adam). A second
monitor measures the same ratio by four forward passes, along the step that the optimizer has made.

    python -m examples.experiments.edge_of_stability            # twenty seconds on two cores
"""

from __future__ import annotations

import csv
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

from examples.experiments.common import (
    Figures,
    Results,
    conclude,
    digits_8x8,
    full_batches,
    make_parser,
    markdown,
    quiet_trainer,
    start,
)
from examples.experiments.style import page
from lightning_ifthpo import SharpnessMonitor
from lightning_ifthpo.plots import plot_sharpness

NAME = "edge_of_stability"
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
    images, labels = (part[:IMAGES] for part in digits_8x8())
    torch.manual_seed(0)
    logger = CSVLogger(folder, name=name)
    monitors = [
        SharpnessMonitor(every_n_batches=EVERY, max_overhead=None),
        SharpnessMonitor(every_n_batches=EVERY, max_overhead=None, method="critical", name="critical"),
    ]
    trainer = quiet_trainer(monitors, logger=logger, log_every_n_steps=EVERY)
    trainer.fit(Classifier(optimizer, lr), full_batches((images - images.mean(0), labels), steps))
    return Path(logger.log_dir) / "metrics.csv"


def column(log: Path, name: str) -> list[float]:
    """Returns what was logged under a name."""
    with log.open(encoding="utf-8", newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


def run(fraction: float, folder: Path) -> tuple[Results, dict[str, Path]]:
    """Trains with both optimizers; returns the ratio to the edge over the last quarter, and the logs."""
    results: Results = {}
    logs = {}
    for name, (_, _, _, steps) in OPTIMIZERS.items():
        logs[name] = log = train(name, max(round(steps * fraction), 4 * EVERY), folder)
        results[name] = last_quarter(log, "sharpness") | {"products": median(column(log, "sharpness/products"))}
        passes = median(column(log, "critical/evaluations"))
        results[name]["critical"] = last_quarter(log, "critical") | {"passes": passes}
    return results, logs


def last_quarter(log: Path, monitor: str) -> Results:
    """Returns mean and extremes of a monitor's ratio to the edge."""
    ratios = column(log, f"{monitor}/edge_ratio")
    settled = ratios[-len(ratios) // 4 :]
    return {"mean": fmean(settled), "least": min(settled), "most": max(settled)}


def draw(logs: dict[str, Path], results: Results) -> Figure:
    """Returns curvature and the edge along both runs."""
    ratios = " and ".join(f"{results[name]['mean']:.2f}" for name in logs)
    figure = page(3.4, f"Curvature and the edge of stability: in the last quarter their ratio is {ratios}")
    for panel, (name, log) in zip(figure.subplots(1, 2), logs.items(), strict=True):
        plot_sharpness(log, panel).set_title(OPTIMIZERS[name][0])
        panel.get_legend().remove()
        panel.yaxis.set_major_formatter("{x:,.0f}")
    figure.legend(*panel.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def summary(results: Results) -> dict[str, float]:
    """Returns the mean ratios."""
    return {name: results[name]["mean"] for name in OPTIMIZERS} | {
        f"{name}, critical": results[name]["critical"]["mean"] for name in OPTIMIZERS
    }


def table(results: Results) -> str:
    """Returns the ratios and the cost of a measurement."""
    rows = []
    for name, (title, _, lr, steps) in OPTIMIZERS.items():
        ratio, critical = results[name], results[name]["critical"]
        spans = [f"{found['mean']:.3f} ({found['least']:.3f} to {found['most']:.3f})" for found in (ratio, critical)]
        costs = [f"{ratio['products']:.0f}", f"{critical['passes']:.0f}"]
        rows.append([title, f"{lr:g}", f"{steps:,}", spans[0], costs[0], spans[1], costs[1]])
    by_products = ["λ_max over the edge, last quarter", "products per measurement"]
    by_passes = ["step over the critical step, last quarter", "forward passes"]
    return markdown(["", "η", "steps", *by_products, *by_passes], rows)


def main(argv: list[str] | None = None) -> Figures:
    """Trains with both optimizers; returns what the last line says."""
    parser = make_parser(__doc__)
    parser.add_argument("--fraction", type=float, default=1.0, help="of the training steps, to see only the start")
    args = parser.parse_args(argv)
    start()
    results, logs = run(args.fraction, args.output / NAME)
    return conclude(NAME, results, args, summary=summary, table=table, draw=partial(draw, logs))


if __name__ == "__main__":
    main()
