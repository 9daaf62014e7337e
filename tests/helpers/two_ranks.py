"""Runs that must come out the same on one process and on two; started by test_two_ranks.py under torchrun."""

import itertools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, DistributedSampler

from lightning_ifthpo import BilevelLightningModule, ExactGeN, IFTHypergradient, SharpnessMonitor
from lightning_ifthpo.core.space import full_tensor
from lightning_ifthpo.hyperparameters import WeightDecay
from lightning_ifthpo.solvers import ConjugateGradient, Nystrom
from tests.helpers.trainers import OWN_METRICS, L, classification_data, quiet_trainer

# how many of each batch of eight belong to the first rank
EVEN, UNEVEN = 4, 5


class Base(BilevelLightningModule, L.LightningModule):
    """A network whose loss is a mean over examples, without anything random."""

    def __init__(self, lr):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        self.lr = lr

    def configure_hyper_optimizer(self):
        return torch.optim.SGD(self.hyperparameters(), lr=0.1)


class Net(Base):
    def __init__(self, lr):
        super().__init__(lr)
        self.register_hyperparameter("decay", WeightDecay(self.net, "tensor", initial=0.05))
        self.register_hyperparameter("unused_at_first", torch.zeros(2))

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


class Sharded(Base):
    """Weights are spread over processes, if there are several; what is tuned is a temperature."""

    def __init__(self, lr):
        super().__init__(lr)
        self.register_hyperparameter("temperature", torch.tensor(0.3))

    def configure_model(self):
        if self.device_mesh is not None:
            for module in (self.net[0], self.net[2], self.net):
                fully_shard(module, mesh=self.device_mesh["data_parallel"])

    def inner_loss(self, batch):
        x, y = batch
        return F.cross_entropy(self.mark_outputs(self.net(x)) * self.temperature.exp(), y)

    def outer_loss(self, batch):
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def configure_optimizers(self):
        return torch.optim.Adam(self.inner_parameters(), lr=self.lr)


def part(seed, first, rank):
    """Six batches of eight examples, or what belongs to a rank."""
    x, y = classification_data(48, seed).tensors
    batches = list(zip(x.split(8), y.split(8), strict=True))
    if rank is None:
        return batches
    chosen = slice(0, first) if rank == 0 else slice(first, 8)
    return [(x[chosen], y[chosen]) for x, y in batches]


class Case(NamedTuple):
    """A run.

    Attributes:
        make: Makes the callback.
        first: How many of each batch of eight belong to the first rank.
        lr: Learning rate.
        spoil: What happens to the batches.
        sharded: Whether weights are spread over the processes.
    """

    make: Callable[[int | None], L.Callback]
    first: int = EVEN
    lr: float = 0.1
    spoil: Callable[..., Any] = lambda batches, rank: batches
    sharded: bool = False


def fit(case, rank, folder):
    module = (Sharded if case.sharded else Net)(case.lr)
    strategy = ModelParallelStrategy(2, 1) if case.sharded else DDPStrategy()
    several = {"devices": 1} if rank is None else {"strategy": strategy, "devices": 2}
    trainer = quiet_trainer(
        callbacks=[case.make(rank)],
        accelerator="cpu",  # two ranks would need two GPUs
        use_distributed_sampler=False,
        limit_val_batches=0,
        logger=CSVLogger(folder),
        **several,
    )
    data = DataLoader(case.spoil(part(1, case.first, rank), rank), batch_size=None)
    error = ""
    try:
        trainer.fit(module, data, data)
    except ValueError as raised:
        error = str(raised)
    state = {name: full_tensor(value).detach().clone() for name, value in module.state_dict().items()}
    assert any(isinstance(weight, DTensor) for weight in module.parameters()) == (case.sharded and rank is not None)
    metrics = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith(OWN_METRICS)}
    return {"state": state, "metrics": metrics, "error": error}


def with_nan_at_the_end(batches, rank):
    """Spoils an example that the second rank sees first, of two."""
    if rank != 0:
        batches[0][0][-1] = torch.nan
    return batches


def hypergradient(first, rank, **options):
    return IFTHypergradient(2, outer_dataloader=part(2, first, rank), on_failure="raise", **options)


def shuffled(rank):
    """Eight examples for each step, whoever draws them."""
    data = DataLoader(classification_data(48, 2), batch_size=8 if rank is None else 4, shuffle=True)
    return IFTHypergradient(2, outer_dataloader=data, on_failure="raise")


def distributed(seed, rank):
    """A loader as the Trainer prepares them for validation."""
    data = classification_data(48, seed)
    sampler = None if rank is None else DistributedSampler(data, num_replicas=2, rank=rank, shuffle=False)
    return DataLoader(data, batch_size=8 if rank is None else 4, sampler=sampler)


class OwnClock(IFTHypergradient):
    """Time goes backwards for the second rank, which would never fire again."""

    def on_train_start(self, trainer, pl_module):
        super().on_train_start(trainer, pl_module)
        self._cadence._clock = itertools.count(step=-1 if trainer.global_rank else 1).__next__
        self._cadence.begin(self._active_stepper.ranks.broadcast_bool)


CG = ConjugateGradient(20, damping=1.0)  # beyond the negative curvature of the first weights
EXACT = {"rtol": 1e-6, "max_overhead": 1e6}
CASES = {
    # weights stay where they are: DDP's own gradients are not weighted per example
    **{
        f"{curvature}, uneven": Case(
            lambda rank, curvature=curvature: hypergradient(UNEVEN, rank, curvature=curvature, solver=CG),
            UNEVEN,
            lr=0.0,
        )
        for curvature in ("hessian", "gauss_newton", "finite_difference")
    },
    "amortized, training": Case(lambda rank: hypergradient(EVEN, rank)),
    "shuffled outer data": Case(shuffled),
    "distributed outer data": Case(
        lambda rank: IFTHypergradient(2, outer_dataloader=distributed(2, rank), on_failure="raise")
    ),
    "a budget of time": Case(
        lambda rank: OwnClock(2, outer_dataloader=part(2, EVEN, rank), on_failure="raise", max_overhead=1e6)
    ),
    "nystrom, training": Case(lambda rank: hypergradient(EVEN, rank, solver=Nystrom(5, damping=0.1))),
    "NaN on one rank": Case(lambda rank: hypergradient(EVEN, rank), spoil=with_nan_at_the_end),
    "sharpness, uneven": Case(lambda rank: SharpnessMonitor(2, trace=True, **EXACT), UNEVEN, lr=0.0),
    "sharpness on fixed examples": Case(lambda rank: SharpnessMonitor(2, dataloader=part(3, EVEN, None), **EXACT)),
    "sharpness on one fixed batch": Case(lambda rank: SharpnessMonitor(2, dataloader=part(3, EVEN, None)[:1], **EXACT)),
    "sharpness on distributed examples": Case(
        lambda rank: SharpnessMonitor(2, dataloader=distributed(3, rank), **EXACT)
    ),
    "critical": Case(lambda rank: SharpnessMonitor(2, method="critical", max_overhead=1e6)),
    "critical on fixed examples": Case(  # two batches for one process, and one for the other
        lambda rank: SharpnessMonitor(2, method="critical", dataloader=part(3, EVEN, None)[:3], max_overhead=1e6)
    ),
    "critical, outer": Case(
        lambda rank: SharpnessMonitor(
            2, method="critical", loss="outer", dataloader=part(3, EVEN, None), max_overhead=1e6
        )
    ),
    "a density that nobody can show": Case(lambda rank: SharpnessMonitor(2, spectral_density=True, **EXACT)),
    **{
        f"gen, {curvature}": Case(lambda rank, curvature=curvature: ExactGeN(curvature=curvature))
        for curvature in ("three_point", "gauss_newton", "finite_difference")
    },
    **{
        f"sharded, {curvature}": Case(
            lambda rank, curvature=curvature: hypergradient(EVEN, rank, curvature=curvature, solver=CG), sharded=True
        )
        for curvature in ("hessian", "gauss_newton", "finite_difference")
    },
    "sharded, amortized": Case(lambda rank: hypergradient(EVEN, rank), sharded=True),
    "sharded, sharpness": Case(lambda rank: SharpnessMonitor(2, **EXACT), sharded=True),
    "sharded, critical": Case(lambda rank: SharpnessMonitor(2, method="critical", max_overhead=1e6), sharded=True),
}


SHARDS_ON_CPU = torch.__version__ >= (2, 8)  # older ones look for streams there


def run(name, folder, rank=None):
    torch.manual_seed(100 * (rank or 0))  # each process draws its own numbers
    return fit(CASES[name], rank, folder)


def possible():
    """The cases that this version of torch can run."""
    return [name for name, case in CASES.items() if SHARDS_ON_CPU or not case.sharded]


def main(folder):
    rank = int(os.environ["RANK"])
    torch.save({name: run(name, folder, rank) for name in possible()}, Path(folder) / f"{rank}.pt")


if __name__ == "__main__":
    main(sys.argv[1])
