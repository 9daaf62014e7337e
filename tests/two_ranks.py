"""Runs that must come out the same on one process and on two; started by test_data_parallel.py under torchrun."""

import os
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.utils.data import DataLoader

from lightning_ifthpo import BilevelLightningModule, ExactGeN, IFTHypergradient, SharpnessMonitor
from lightning_ifthpo.hyperparameters import WeightDecay
from lightning_ifthpo.solvers import ConjugateGradient, Nystrom
from tests.trainers import OWN_METRICS, L, classification_data, quiet_trainer

# how many of each batch of eight belong to the first rank
EVEN, UNEVEN = 4, 5


class Net(BilevelLightningModule, L.LightningModule):
    """A network whose loss is a mean over examples, without anything random."""

    def __init__(self, lr):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        self.register_hyperparameter("decay", WeightDecay(self.net, "tensor", initial=0.05))
        self.register_hyperparameter("unused_at_first", torch.zeros(2))
        self.lr = lr

    def inner_loss(self, batch):
        x, y = batch
        logits = self.mark_outputs(self.net(x))
        # only the first class weighs: a rank without any example of it has no derivative
        weights = 1.0 + self.unused_at_first[0] * (y == 1)
        return (weights * F.cross_entropy(logits, y, reduction="none")).mean() + self.decay()

    def outer_loss(self, batch):
        x, y = batch
        return F.cross_entropy(self.net(x), y) + 0.1 * self.unused_at_first.square().sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.inner_parameters(), lr=self.lr, momentum=0.9)

    def configure_hyper_optimizer(self):
        return torch.optim.SGD(self.hyperparameters(), lr=0.1)


def part(seed, first, rank):
    """Six batches of eight examples, or what belongs to a rank."""
    x, y = classification_data(48, seed).tensors
    batches = list(zip(x.split(8), y.split(8), strict=True))
    if rank is None:
        return batches
    chosen = slice(0, first) if rank == 0 else slice(first, 8)
    return [(x[chosen], y[chosen]) for x, y in batches]


def fit(callback, first, lr, rank):
    module = Net(lr)
    strategy = {} if rank is None else {"strategy": DDPStrategy(), "devices": 2}
    trainer = quiet_trainer(callbacks=[callback], use_distributed_sampler=False, limit_val_batches=0, **strategy)
    data = DataLoader(part(1, first, rank), batch_size=None)
    trainer.fit(module, data, data)
    state = {name: value.detach().clone() for name, value in module.state_dict().items()}
    metrics = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith(OWN_METRICS)}
    return {"state": state, "metrics": metrics}


def hypergradient(first, rank, **options):
    return IFTHypergradient(2, outer_dataloader=part(2, first, rank), on_failure="raise", **options)


CG = ConjugateGradient(20, damping=1.0)  # beyond the negative curvature of the first weights
CASES = {
    # weights stay where they are: DDP's own gradients are not weighted per example
    **{
        f"{curvature}, uneven": (
            lambda rank, curvature=curvature: hypergradient(UNEVEN, rank, curvature=curvature, solver=CG),
            UNEVEN,
            0.0,
        )
        for curvature in ("hessian", "gauss_newton", "finite_difference")
    },
    "amortized, training": (lambda rank: hypergradient(EVEN, rank), EVEN, 0.1),
    "a budget of time": (lambda rank: hypergradient(EVEN, rank, max_overhead=1e6), EVEN, 0.1),
    "nystrom, training": (lambda rank: hypergradient(EVEN, rank, solver=Nystrom(5, damping=0.1)), EVEN, 0.1),
    "sharpness, uneven": (lambda rank: SharpnessMonitor(2, rtol=1e-6, trace=True, max_overhead=1e6), UNEVEN, 0.0),
    "sharpness on fixed examples": (lambda rank: SharpnessMonitor(2, dataloader=part(3, EVEN, None)), EVEN, 0.1),
    **{
        f"gen, {curvature}": (lambda rank, curvature=curvature: ExactGeN(curvature=curvature), EVEN, 0.1)
        for curvature in ("three_point", "gauss_newton", "finite_difference")
    },
}


def run(name, rank=None):
    make, first, lr = CASES[name]
    return fit(make(rank), first, lr, rank)


def main(folder):
    rank = int(os.environ["RANK"])
    torch.save({name: run(name, rank) for name in CASES}, Path(folder) / f"{rank}.pt")


if __name__ == "__main__":
    main(sys.argv[1])
