"""Checks an installed package: it trains, writes a report, and comes from the folder that is named.

PYTHONPATH=site python .ci/smoke.py site
"""

import sys
from pathlib import Path

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_ifthpo
from lightning_ifthpo import BilevelLightningModule, IFTHypergradient, TrainingReport
from lightning_ifthpo.hyperparameters import WeightDecay

assert Path(lightning_ifthpo.__file__).is_relative_to(Path(sys.argv[1]).resolve()), lightning_ifthpo.__file__
assert (Path(lightning_ifthpo.__file__).parent / "py.typed").exists()


class Line(BilevelLightningModule, L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(3, 1)
        self.register_hyperparameter("decay", WeightDecay(self.net, "tensor"))

    def inner_loss(self, batch):
        return self.outer_loss(batch) + self.decay()

    def outer_loss(self, batch):
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


data = DataLoader(TensorDataset(torch.randn(60, 3), torch.randn(60, 1)), 20)
callbacks = [IFTHypergradient(outer_dataloader=data), TrainingReport("report.html")]
options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
L.Trainer(max_epochs=5, callbacks=callbacks, accelerator="cpu", **options).fit(Line(), data, data)
assert "<h2" in Path("report.html").read_text(encoding="utf-8")
