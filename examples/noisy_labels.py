"""Wrong labels
===============

Find wrong labels: one weight for each training example, learned while the network trains.

40 % of the labels of 1,000 digits are wrong. 300 digits with correct labels, the outer data, show which examples help.
Examples with wrong labels end with low weights, and the network that learns the weights is itself more accurate.

    python examples/noisy_labels.py
"""

from __future__ import annotations

import json
from pathlib import Path

import lightning as L
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ifthpo import BilevelLightningModule, IFTHypergradient
from lightning_ifthpo.hyperparameters import IndexedDataset, SampleWeights

TRAINING, OUTER, WRONG = 1000, 300, 400


class Digits(BilevelLightningModule, L.LightningModule):
    """A perceptron with a weight, between 0 and 2, for each of its training examples."""

    weights: SampleWeights

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        self.register_hyperparameter("weights", SampleWeights(TRAINING))

    def inner_loss(self, batch: list[Tensor]) -> Tensor:
        """Returns the weighted loss; `IndexedDataset` adds the index of each example to the batch."""
        images, digits, index = batch
        logits = self.mark_outputs(self.net(images))
        losses: Tensor = self.weights(index) * F.cross_entropy(logits, digits, reduction="none")
        return losses.mean()

    def outer_loss(self, batch: list[Tensor]) -> Tensor:
        """Returns the loss on correct labels, which the weights minimize."""
        images, digits = batch
        return F.cross_entropy(self.net(images), digits)

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Logs the accuracy."""
        images, digits = batch
        self.log("accuracy", (self.net(images).argmax(1) == digits).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Returns the optimizer of the network."""
        return torch.optim.SGD(self.inner_parameters(), lr=0.1)


def load_data() -> tuple[TensorDataset, TensorDataset, TensorDataset, Tensor]:
    """Returns training, outer and test data, and which training labels are wrong."""
    pixels, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels))
    images, digits = torch.tensor(pixels, dtype=torch.float32)[order] / 16, torch.tensor(labels)[order]
    digits[:WRONG] = (digits[:WRONG] + torch.randint(1, 10, (WRONG,))) % 10
    sizes = [TRAINING, OUTER, len(labels) - TRAINING - OUTER]
    parts = zip(torch.split(images, sizes), torch.split(digits, sizes), strict=True)
    train, outer, test = (TensorDataset(*part) for part in parts)
    return train, outer, test, torch.arange(TRAINING) < WRONG


def fit(*, tuned: bool) -> tuple[float, float]:
    """Returns the test accuracy of a network, and how well its weights tell wrong labels from correct ones."""
    L.seed_everything(0)
    train, outer, test, wrong = load_data()
    hypergradient = IFTHypergradient(5, start_after_batches=100, outer_dataloader=DataLoader(outer, OUTER))
    trainer = L.Trainer(
        max_epochs=100,
        callbacks=[hypergradient] if tuned else [],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    module = Digits()
    trainer.fit(module, DataLoader(IndexedDataset(train), 100, shuffle=True))
    (metrics,) = trainer.test(module, DataLoader(test, len(test)))
    weights = module.weights(torch.arange(TRAINING)).detach()
    if tuned:
        kinds, colors = ["wrong labels", "correct labels"], ["#D55E00", "#0072B2"]  # for the colour-blind, too
        plt.hist([weights[wrong], weights[~wrong]], bins=20, color=colors, label=kinds)
        plt.gca().set(title="Learned weights tell wrong labels from correct ones", xlabel="weight", ylabel="examples")
        plt.legend(loc="upper center")
        plt.savefig("noisy_labels.png")
    return metrics["accuracy"], float(roc_auc_score(wrong, -weights))


def main() -> dict[str, dict[str, float]]:
    """Trains with equal weights and with learned ones; returns what the last line says."""
    equal, _ = fit(tuned=False)
    learned, auc = fit(tuned=True)
    print(f"test accuracy {equal:.3f} with equal weights, {learned:.3f} with learned ones")
    print(f"{auc:.1%} of all pairs of a wrong and a correct label are ordered correctly by their weights")

    measured = {"accuracy, equal weights": equal, "accuracy, learned weights": learned, "AUC of the weights": auc}
    expected = json.loads(Path(__file__).with_name("results.json").read_text()).get("noisy_labels", {})
    result = {name: {"measured": round(value, 4), "expected": expected.get(name)} for name, value in measured.items()}
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
