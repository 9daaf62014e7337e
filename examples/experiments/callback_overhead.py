"""What the callbacks cost: training time with each of them over training time without, in turns in one process.

Times are processor times of one thread, so that other programs hardly matter, and the runs take turns. `ExactGeN` looks
some 64 times while its rate climbs, then on every 64th batch. The ratio includes both.

    python -m examples.experiments.callback_overhead            # eight minutes
    python -m examples.experiments.callback_overhead --steps 200 --models perceptron
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from examples.experiments.common import (
    Figures,
    Results,
    conclude,
    make_parser,
    markdown,
    mnist_5k,
    quiet_trainer,
    start,
)
from lightning_ifthpo import BilevelLightningModule, ExactGeN, IFTHypergradient, SharpnessMonitor
from lightning_ifthpo.hyperparameters import WeightDecay

NAME = "callback_overhead"
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
    """Returns the processor time of training."""
    torch.manual_seed(0)
    trainer = quiet_trainer(callbacks, max_epochs=-1, max_steps=steps, limit_val_batches=0)
    loader = DataLoader(images, BATCH, shuffle=True, drop_last=True)
    module = Classifier(MODELS[model]())
    began = time.process_time()
    trainer.fit(module, loader)
    return time.process_time() - began


def summary(results: Results) -> dict[str, float]:
    """Returns the ratios."""
    ratios = results["ratios"]
    return {f"{model}, {name}": ratios[model][name] for model in ratios for name in ratios[model]}


def table(results: Results) -> str:
    """Returns the ratios for each model."""
    ratios = results["ratios"]
    rows = ([f"`{name}`", *(f"{ratios[model][name]:.2f}" for model in ratios)] for name in CALLBACKS)
    return markdown(["time of training, without callback = 1", *ratios], rows)


def main(argv: list[str] | None = None) -> Figures:
    """Measures all callbacks; returns what the last line says."""
    parser = make_parser(__doc__)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    args = parser.parse_args(argv)
    start(ignore=["hyper step"])
    pixels, labels = mnist_5k()
    is_outer = torch.arange(len(labels)) % 5 == 0  # images are sorted by digit
    images, others = (TensorDataset(pixels[part] / 255, labels[part]) for part in (~is_outer, is_outer))
    outer = DataLoader(others, BATCH)
    ratios: dict[str, dict[str, float]] = {model: {} for model in args.models}
    for model, by_callback in ratios.items():
        seconds(model, [], images, min(args.steps, 50))
        for name, make in CALLBACKS.items():
            plain = seconds(model, [], images, args.steps)
            by_callback[name] = round(seconds(model, [make(outer)], images, args.steps) / plain, 2)
            print(f"{model}, {name}: {by_callback[name]} times {1000 * plain / args.steps:.1f} ms a step", flush=True)
    return conclude(NAME, {"ratios": ratios}, args, summary=summary, table=table)


if __name__ == "__main__":
    main()
