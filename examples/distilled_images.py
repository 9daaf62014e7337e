"""Ten learned images in place of 1,400
=======================================

Replace 1,400 images by ten: every pixel of a synthetic training set is a hyperparameter.

The network learns from ten synthetic digits only (inner loss). These are tuned so that it classifies real digits (outer
loss). Then a fresh network is trained on the ten images, and tested on real images that were used for nothing.

    python examples/distilled_images.py
"""

from __future__ import annotations

import json
from pathlib import Path

import lightning as L
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from lightning_ifthpo import BilevelLightningModule, IFTHypergradient
from lightning_ifthpo.hyperparameters import DistilledData
from lightning_ifthpo.solvers import ConjugateGradient


class Distiller(BilevelLightningModule, L.LightningModule):
    """Softmax regression, and the images that it learns from."""

    images: DistilledData

    def __init__(self, initial: Tensor) -> None:
        super().__init__()
        self.net = nn.Linear(64, 10)
        self.register_hyperparameter("images", DistilledData((64,), classes=10, initial=initial))

    def inner_loss(self, batch: object) -> Tensor:
        """Returns the loss on the synthetic images, whatever the batch; the decay makes it strictly convex."""
        images, digits = self.images()
        decay = sum(parameter.square().sum() for parameter in self.net.parameters())
        return F.cross_entropy(self.mark_outputs(self.net(images)), digits) + 1e-3 * decay

    def outer_loss(self, batch: list[Tensor]) -> Tensor:
        """Returns the loss on real images."""
        images, digits = batch
        return F.cross_entropy(self.net(images), digits)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Returns the optimizer of the network."""
        return torch.optim.SGD(self.inner_parameters(), lr=0.5, momentum=0.9)


def quiet_trainer(callbacks: list[L.Callback]) -> L.Trainer:
    """Returns a Trainer for one epoch that writes nothing."""
    return L.Trainer(
        max_epochs=1, callbacks=callbacks, logger=False, enable_checkpointing=False, enable_progress_bar=False
    )


def accuracy_of_a_fresh_network(images: Tensor, test: tuple[Tensor, Tensor]) -> float:
    """Trains a new network on ten images, and returns its accuracy on real ones."""
    module = Distiller(images)
    quiet_trainer([]).fit(module, range(1000))
    inputs, digits = test
    return float((module.net(inputs).argmax(1) == digits).float().mean())


def main() -> dict[str, dict[str, float]]:
    """Distils, starting from a real image of each digit; returns what the last line says."""
    L.seed_everything(0)
    pixels, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(labels))
    outer, held_out = random_split(data, [1400, 397])
    inputs, digits = outer[:]
    first = torch.stack([inputs[digits == digit][0] for digit in range(10)])

    module = Distiller(first)
    # The inner problem is the same ten images at every step, so it pays to solve the linear system well.
    hypergradient = IFTHypergradient(5, solver=ConjugateGradient(10), outer_dataloader=DataLoader(outer, 700))
    quiet_trainer([hypergradient]).fit(module, range(1500))

    distilled = module.images()[0].detach()
    figure, panels = plt.subplots(2, 10, figsize=(8.0, 2.2))
    figure.suptitle("A real image of each digit (above), and what it became (below)")
    for panel, image in zip(panels.flat, torch.cat([first, distilled]), strict=True):
        panel.imshow(image.view(8, 8).numpy(), cmap="gray")
        panel.set_axis_off()
    plt.savefig("distilled_images.png")
    measured = {
        "accuracy, ten real images": accuracy_of_a_fresh_network(first, held_out[:]),
        "accuracy, ten learned images": accuracy_of_a_fresh_network(distilled, held_out[:]),
    }
    print(*(f"{name} {value:.3f}" for name, value in measured.items()), sep="; ")
    expected = json.loads(Path(__file__).with_name("results.json").read_text()).get("distilled_images", {})
    result = {name: {"measured": round(value, 4), "expected": expected.get(name)} for name, value in measured.items()}
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
