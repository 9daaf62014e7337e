"""Training without a learning rate
===================================

Train without choosing a learning rate.

`ExactGeN` fits a parabola to the loss along the optimizer's own step, on the next batch, and sets the learning rate to
where the loss falls most. The rate in `configure_optimizers` is not used: from 1e-6 and from 1 training is the same.

    python examples/learning_rate.py
"""

from __future__ import annotations

import json
from pathlib import Path

import lightning as L
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from lightning_ifthpo import ExactGeN


class Digits(L.LightningModule):
    """A perceptron; nothing in it knows of the callback."""

    def __init__(self, lr: float) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        self.lr = lr

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Returns the cross-entropy."""
        images, digits = batch
        return F.cross_entropy(self.net(images), digits)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Returns an optimizer with whatever rate somebody has typed."""
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


def fit(lr: float, callbacks: list[L.Callback]) -> tuple[float, float]:
    """Returns test accuracy, and the learning rate at the end."""
    L.seed_everything(0)
    pixels, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(labels))
    train, test = random_split(data, [1400, 397])
    trainer = L.Trainer(
        max_epochs=15, callbacks=callbacks, logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    module = Digits(lr)
    trainer.fit(module, DataLoader(train, 100, shuffle=True))
    images, digits = test[:]
    accuracy = float((module.net(images).argmax(1) == digits).float().mean())
    return accuracy, trainer.optimizers[0].param_groups[0]["lr"]


def main() -> dict[str, dict[str, float]]:
    """Trains from two absurd rates, with the callback and without; returns what the last line says."""
    measured = {}
    for lr in (1e-6, 1.0):
        measured[f"accuracy, constant rate {lr:g}"], _ = fit(lr, [])
        measured[f"accuracy, ExactGeN from {lr:g}"], rate = fit(lr, [ExactGeN()])
        print(f"ExactGeN was given {lr:g} and ended at {rate:.3g}, after its final decay")
    expected = json.loads(Path(__file__).with_name("results.json").read_text()).get("learning_rate", {})
    result = {name: {"measured": round(value, 4), "expected": expected.get(name)} for name, value in measured.items()}
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
