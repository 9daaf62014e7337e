"""All three callbacks, the solver and the hyper-optimizer from YAML files and the command line, by LightningCLI.

A perceptron on scikit-learn's digits. Three files in `examples/configs` show what can be written there:

    tune.yaml          IFTHypergradient with a solver of its own; AdamW as hyper-optimizer
    watch.yaml         SharpnessMonitor under Adam, with TensorBoard
    everything.yaml    both, and ExactGeN in place of a learning rate

Run:
    python examples/cli.py --config examples/configs/tune.yaml
    python examples/cli.py --config examples/configs/tune.yaml --trainer.callbacks.every_n_batches 10
    python examples/cli.py --config examples/configs/everything.yaml --model.width 128 --trainer.max_epochs 20
    python examples/cli.py --help
"""

from __future__ import annotations

import json
import warnings
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.cli import LightningCLI, OptimizerCallable
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from lightning_ifthpo import BilevelLightningModule
from lightning_ifthpo.hyperparameters import LabelSmoothing, WeightDecay

SIZES = {"train": 600, "outer": 400, "validation": 200, "test": 597}
EXPECTED = 0.9548  # test accuracy with tune.yaml


class Digits(BilevelLightningModule, L.LightningModule):
    """A perceptron whose weight decay, one for each tensor, and label smoothing are hyperparameters.

    Args:
        width: Units of the hidden layer.
        optimizer: Of the weights.
        hyper_optimizer: Of the hyperparameters.
    """

    decay: WeightDecay
    smoothing: LabelSmoothing

    def __init__(
        self,
        width: int = 64,
        optimizer: OptimizerCallable = lambda weights: torch.optim.SGD(weights, lr=0.1, momentum=0.9),
        hyper_optimizer: OptimizerCallable = lambda hyperparameters: torch.optim.Adam(hyperparameters, lr=0.05),
    ) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))
        self.register_hyperparameter("decay", WeightDecay(self.net, "tensor"))
        self.register_hyperparameter("smoothing", LabelSmoothing(10))
        self.optimizer, self.hyper_optimizer = optimizer, hyper_optimizer

    def inner_loss(self, batch: list[Tensor]) -> Tensor:
        """Returns what the weights minimize."""
        images, digits = batch
        logits = self.mark_outputs(self.net(images))
        loss: Tensor = F.cross_entropy(logits, self.smoothing(digits)) + self.decay()
        return loss

    def outer_loss(self, batch: list[Tensor]) -> Tensor:
        """Returns what the hyperparameters minimize."""
        images, digits = batch
        return F.cross_entropy(self.net(images), digits)

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Logs the accuracy."""
        images, digits = batch
        self.log("accuracy", (self.net(images).argmax(1) == digits).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Returns the optimizer of the weights."""
        return self.optimizer(self.inner_parameters())

    def configure_hyper_optimizer(self) -> torch.optim.Optimizer:
        """Returns the optimizer of the hyperparameters."""
        return self.hyper_optimizer(self.hyperparameters())


class DigitsData(L.LightningDataModule):
    """The 1,797 digits of scikit-learn, split at random.

    Args:
        batch_size: Of all loaders.
    """

    def __init__(self, batch_size: int = 50) -> None:
        super().__init__()
        self.batch_size = batch_size
        pixels, labels = load_digits(return_X_y=True)
        data = TensorDataset(torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(labels))
        parts = random_split(data, list(SIZES.values()), torch.Generator().manual_seed(0))
        self.parts = dict(zip(SIZES, parts, strict=True))

    def train_dataloader(self) -> DataLoader[Any]:
        """Returns what the weights are trained on."""
        return DataLoader(self.parts["train"], self.batch_size, shuffle=True)

    def outer_dataloader(self) -> DataLoader[Any]:
        """Returns what the hyperparameters are tuned on."""
        return DataLoader(self.parts["outer"], self.batch_size)

    def val_dataloader(self) -> DataLoader[Any]:
        """Returns what training is watched on."""
        return DataLoader(self.parts["validation"], self.batch_size)

    def test_dataloader(self) -> DataLoader[Any]:
        """Returns what nothing was chosen by."""
        return DataLoader(self.parts["test"], self.batch_size)


def main(argv: list[str] | None = None) -> dict[str, dict[str, float]]:
    """Trains and tests as the arguments say; returns the test accuracy."""
    warnings.filterwarnings("ignore", ".*(does not have many workers|number of training batches)")
    cli = LightningCLI(Digits, DigitsData, run=False, seed_everything_default=0, save_config_callback=None, args=argv)
    cli.trainer.fit(cli.model, cli.datamodule)
    (metrics,) = cli.trainer.test(cli.model, cli.datamodule, verbose=False)
    result = {"test accuracy": {"measured": round(metrics["accuracy"], 4), "expected": EXPECTED}}
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
