"""Stop and resume
==================

Stop a run and resume it: the hyperparameters end at the same values as without the stop, bit for bit.

The checkpoints of Lightning hold all that tuning needs: the hyperparameters, as parameters of the module, and the state
of `IFTHypergradient`, which is its hyper-optimizer, the last solution and the position in the outer data.

    python examples/resume.py
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import lightning as L
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from lightning_ifthpo import BilevelLightningModule, IFTHypergradient


class Digits(BilevelLightningModule, L.LightningModule):
    """Softmax regression with a hyperparameter of its own making: one penalty for each pixel."""

    log_penalties: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(64, 10)
        self.register_hyperparameter("log_penalties", torch.full((64,), -6.0))

    def inner_loss(self, batch: list[Tensor]) -> Tensor:
        """Returns what the weights minimize."""
        images, digits = batch
        penalty = (self.log_penalties.exp() * self.net.weight.square()).sum()
        return F.cross_entropy(self.mark_outputs(self.net(images)), digits) + penalty

    def outer_loss(self, batch: list[Tensor]) -> Tensor:
        """Returns what the penalties minimize."""
        images, digits = batch
        return F.cross_entropy(self.net(images), digits)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Returns the optimizer of the weights."""
        return torch.optim.AdamW(self.inner_parameters(), lr=1e-2, weight_decay=0.0)


def fit(epochs: int, folder: Path, checkpoint: Path | None = None) -> Digits:
    """Trains up to some epoch, from the start or from a checkpoint, and saves a checkpoint at the end."""
    L.seed_everything(0)
    pixels, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(labels))
    train, outer, _ = random_split(data, [600, 400, 797])
    trainer = L.Trainer(
        max_epochs=epochs,
        callbacks=[IFTHypergradient(every_n_batches=4, outer_dataloader=DataLoader(outer, 100, shuffle=True))],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    module = Digits()
    trainer.fit(module, DataLoader(train, 50), ckpt_path=checkpoint)
    trainer.save_checkpoint(folder / f"{epochs}.ckpt")
    return module


def main() -> dict[str, dict[str, float]]:
    """Trains at once, and in two parts; returns what the last line says."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        at_once = fit(10, folder)
        fit(5, folder)  # as if the machine had stopped here
        resumed = fit(10, folder, folder / "5.ckpt")
    pairs = zip(at_once.parameters(), resumed.parameters(), strict=True)
    difference = max(float((one - other).detach().abs().max()) for one, other in pairs)
    moved = float((resumed.log_penalties + 6.0).abs().max())
    print(f"largest difference of any weight or penalty: {difference}; log penalties moved by up to {moved:.2f}")

    measured = {"difference after resuming": difference, "movement of the penalties": moved}
    expected = json.loads(Path(__file__).with_name("results.json").read_text()).get("resume", {})
    result = {name: {"measured": round(value, 4), "expected": expected.get(name)} for name, value in measured.items()}
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
