"""From the command line
========================

Callbacks, solver and hyper-optimizer from YAML files, by LightningCLI. The files in `examples/configs` show what can be
written there: `tune.yaml`, the default, has IFTHypergradient with a solver and AdamW as hyper-optimizer; `watch.yaml`
SharpnessMonitor with Adam and TensorBoard; `everything.yaml` both, and ExactGeN in place of a learning rate.

    python examples/cli.py --config examples/configs/tune.yaml --trainer.callbacks.every_n_batches 10
    python examples/cli.py --config examples/configs/everything.yaml --model.width 128
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
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

SIZES = [600, 400, 200, 597]  # training, outer, validation, test
CONFIGS = Path(__file__).with_name("configs")


class Digits(BilevelLightningModule, L.LightningModule):
    """A perceptron whose weight decay, one for each tensor, and label smoothing are hyperparameters."""

    decay: WeightDecay
    smoothing: LabelSmoothing

    def __init__(
        self,
        width: int = 64,
        optimizer: OptimizerCallable = lambda weights: torch.optim.SGD(weights, lr=0.1, momentum=0.9),
        hyper_optimizer: OptimizerCallable | None = None,
    ) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))
        self.register_hyperparameter("decay", WeightDecay(self.net, "tensor"))
        self.register_hyperparameter("smoothing", LabelSmoothing(10))
        self.optimizer, self.hyper_optimizer = optimizer, hyper_optimizer

    def inner_loss(self, batch: list[Tensor]) -> Tensor:
        """Returns what the weights minimize."""
        logits = self.mark_outputs(self.net(batch[0]))
        loss: Tensor = F.cross_entropy(logits, self.smoothing(batch[1])) + self.decay()
        return loss

    def outer_loss(self, batch: list[Tensor]) -> Tensor:
        """Returns what the hyperparameters minimize."""
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Logs the accuracy."""
        self.log("accuracy", (self.net(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Returns the optimizer of the weights."""
        return self.optimizer(self.inner_parameters())

    def configure_hyper_optimizer(self) -> torch.optim.Optimizer | None:
        """Returns the optimizer of the hyperparameters; None for the default, which needs no learning rate."""
        return self.hyper_optimizer and self.hyper_optimizer(self.hyperparameters())


class DigitsData(L.LightningDataModule):
    """The 1,797 digits of scikit-learn, split at random."""

    def __init__(self, batch_size: int = 50) -> None:
        super().__init__()
        self.batch_size = batch_size
        pixels, labels = load_digits(return_X_y=True)
        data = TensorDataset(torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(labels))
        self.train, self.outer, self.val, self.test = random_split(data, SIZES, torch.Generator().manual_seed(0))

    def train_dataloader(self) -> DataLoader[Any]:
        """Returns what the weights are trained on."""
        return DataLoader(self.train, self.batch_size, shuffle=True)

    def outer_dataloader(self) -> DataLoader[Any]:
        """Returns what the hyperparameters are tuned on."""
        return DataLoader(self.outer, self.batch_size)

    def val_dataloader(self) -> DataLoader[Any]:
        """Returns what training is watched on."""
        return DataLoader(self.val, self.batch_size)

    def test_dataloader(self) -> DataLoader[Any]:
        """Returns what nothing was chosen by."""
        return DataLoader(self.test, self.batch_size)


def main(argv: list[str] | None = None) -> dict[str, dict[str, float]]:
    """Trains and tests as the arguments say; returns the test accuracy."""
    warnings.filterwarnings("ignore", ".*(does not have many workers|number of training batches)")
    args = sys.argv[1:] if argv is None else argv
    if "--config" not in args:
        args = ["--config", str(CONFIGS / "tune.yaml"), *args]
    cli = LightningCLI(Digits, DigitsData, run=False, seed_everything_default=0, save_config_callback=None, args=args)
    cli.trainer.fit(cli.model, cli.datamodule)
    (metrics,) = cli.trainer.test(cli.model, cli.datamodule, verbose=False)
    config = Path(args[args.index("--config") + 1]).stem
    expected = json.loads(Path(__file__).with_name("results.json").read_text()).get("cli", {})
    result = {"test accuracy": {"measured": round(metrics["accuracy"], 4), "expected": expected.get(config)}}
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
