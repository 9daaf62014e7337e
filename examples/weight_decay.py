"""One weight decay for each tensor
===================================

Tune one weight decay for each tensor of a network inside a single training run, and use what was tuned.

The decays start at 0.1, which is far too much. 200 digits train the network, and 600 others, the outer data, show in
which direction each decay should move. What makes the module bilevel: the mixin, the hyperparameter, the penalty in the
training loss, the outer loss, and the callback. The tuned decays are then written as YAML, and two networks are trained
anew without a hyper step: one with the final decays, one with the decays moving as they did.

    python examples/weight_decay.py
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path

import lightning as L
import torch
import torch.nn.functional as F
import yaml
from lightning.pytorch.callbacks import Callback
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from lightning_ifthpo import (
    BilevelLightningModule,
    HyperparameterRecorder,
    HyperparameterSchedule,
    IFTHypergradient,
)
from lightning_ifthpo.hyperparameters import WeightDecay


class Digits(BilevelLightningModule, L.LightningModule):
    """A perceptron with a weight decay for each of its four tensors."""

    decay: WeightDecay

    def __init__(self, decay: float | Mapping[str, float] = 0.1) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        self.register_hyperparameter("decay", WeightDecay(self.net, "tensor", initial=decay))

    def inner_loss(self, batch: list[Tensor]) -> Tensor:
        """Returns what the weights minimize, on the training data."""
        images, digits = batch
        loss: Tensor = F.cross_entropy(self.mark_outputs(self.net(images)), digits) + self.decay()
        return loss

    def outer_loss(self, batch: list[Tensor]) -> Tensor:
        """Returns what the decays minimize, on data that the weights are not trained on."""
        images, digits = batch
        return F.cross_entropy(self.net(images), digits)

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Logs the loss on data that neither weights nor decays have seen."""
        self.log("test_loss", self.outer_loss(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Returns the optimizer of the weights."""
        return torch.optim.SGD(self.inner_parameters(), lr=0.1, momentum=0.9)


def trained(callbacks: list[Callback], decay: float | Mapping[str, float] = 0.1) -> tuple[float, Digits]:
    """Trains a network and returns its test loss, and the module."""
    L.seed_everything(0)
    pixels, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(labels))
    train, outer, test = (DataLoader(part, 100) for part in random_split(data, [200, 600, 997]))
    trainer = L.Trainer(
        max_epochs=300, callbacks=callbacks, logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    module = Digits(decay)
    module.outer_dataloader = lambda: outer  # type: ignore[method-assign]
    trainer.fit(module, train)
    (metrics,) = trainer.test(module, test)
    return metrics["test_loss"], module


def main() -> dict[str, dict[str, float]]:
    """Trains with all kinds of decays; returns what the last line says."""
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "decays.pt"
        untuned, _ = trained([])
        tuned, module = trained([IFTHypergradient(every_n_batches=5), HyperparameterRecorder(record)])
        scheduled, _ = trained([HyperparameterSchedule(record)])
    print(f"test loss {untuned:.3f} with all decays at 0.1, {tuned:.3f} with tuned decays:")
    text = yaml.safe_dump(module.hyperparameter_values())
    print(text)
    again, _ = trained([], yaml.safe_load(text)["decay"])
    print(f"trained anew: {again:.3f} with these decays, {scheduled:.3f} with the decays moving as they did")

    measured = {
        "test loss, not tuned": untuned,
        "test loss, tuned": tuned,
        "test loss, anew with the final decays": again,
        "test loss, anew with the schedule": scheduled,
    }
    expected = json.loads(Path(__file__).with_name("results.json").read_text()).get("weight_decay", {})
    result = {name: {"measured": round(value, 4), "expected": expected.get(name)} for name, value in measured.items()}
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
