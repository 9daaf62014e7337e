"""To the edge of stability
===========================

Watch curvature grow to the edge of stability, and stay there.

`SharpnessMonitor` logs the largest eigenvalue of the Hessian while a network learns. Gradient descent is stable while
that eigenvalue is below 2/η. It grows until it gets there and then stays: `edge_ratio` becomes 1 (Cohen et al. 2021).
The monitor works with any LightningModule and changes nothing in its training.

    python examples/sharpness.py
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean
from typing import Any

import lightning as L
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ifthpo import SharpnessMonitor

IMAGES, STEPS, EVERY = 500, 600, 20


class Digits(L.LightningModule):
    """A tanh network with squared error: with cross-entropy, curvature falls before it reaches the edge."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 10))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Returns half the squared error."""
        images, digits = batch
        loss: Tensor = (self.net(images) - F.one_hot(digits, 10)).square().sum(1).mean() / 2
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Returns plain gradient descent with η = 0.5, whose edge is 2/η = 4."""
        return torch.optim.SGD(self.parameters(), lr=0.5)


class Ratios(L.Callback):
    """Collects what the monitor logs; a logger or `EarlyStopping` reads it in the same way."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *batch: Any) -> None:
        """Notes the last measurement."""
        if trainer.global_step % EVERY == 0:
            self.seen.append(float(trainer.callback_metrics["sharpness/edge_ratio"]))


def main() -> dict[str, dict[str, float]]:
    """Trains with full batches; returns what the last line says."""
    L.seed_everything(0)
    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels[:IMAGES], dtype=torch.float32) / 16
    data = TensorDataset(images - images.mean(0), torch.tensor(labels[:IMAGES]))
    ratios = Ratios()
    trainer = L.Trainer(
        max_epochs=STEPS,
        callbacks=[SharpnessMonitor(every_n_batches=EVERY, max_overhead=None), ratios],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(Digits(), DataLoader(data, IMAGES))
    print("largest eigenvalue over the edge:", *(f"{ratio:.2f}" for ratio in ratios.seen))
    plt.plot(range(EVERY, STEPS + 1, EVERY), ratios.seen, ".-", color="#0072B2")
    plt.axhline(1.0, color="black", linestyle="--", label="the edge of stability")
    plt.gca().set(
        title="Curvature grows to the edge, and stays there", xlabel="step", ylabel="largest eigenvalue over 2/η"
    )
    plt.legend(loc="lower right")
    plt.savefig("sharpness.png")

    measured = {"edge ratio, first": ratios.seen[0], "edge ratio, last ten": fmean(ratios.seen[-10:])}
    expected = json.loads(Path(__file__).with_name("results.json").read_text()).get("sharpness", {})
    result = {name: {"measured": round(value, 4), "expected": expected.get(name)} for name, value in measured.items()}
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
