"""What is measured, and a process that measures it when the parent asks.

Each cost is a ratio to a training gradient, which is measured in the same process and in the same round. The clock
counts the processor time of this process, which has one thread, so that other programs on the machine hardly matter.
Only public names are used, so that the same file measures older versions of the package: the parent sets PYTHONPATH to
choose one.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_ifthpo
from lightning_ifthpo import (
    BilevelLightningModule,
    ExactGeN,
    IFTHypergradient,
    SharpnessMonitor,
    implicit_hypergradient,
)
from lightning_ifthpo.curvature import (
    CurvatureOperator,
    FiniteDifferenceOperator,
    GaussNewtonOperator,
    GradientOuterProductOperator,
    HessianOperator,
    KFACOperator,
)
from lightning_ifthpo.hyperparameters import IndexedDataset, SampleWeights
from lightning_ifthpo.solvers import (
    Amortized,
    ConjugateGradient,
    Direct,
    Identity,
    MinimumResidual,
    Neumann,
    Nystrom,
)
from lightning_ifthpo.spectrum import lanczos, power_iteration

BATCH = 128
EXAMPLES = 2048
"""Training examples, each with a weight of its own as hyperparameter."""
BATCHES = 10
"""Batches of each fit; the first two are not counted, since the callbacks start cold there."""
LEAST_SECONDS = 0.1
"""Calls are repeated for at least this long, so that one slow call does not decide."""

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
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda weights: torch.optim.SGD(weights, lr=0.05, momentum=0.9),
    "AdamW": lambda weights: torch.optim.AdamW(weights, lr=1e-3),
}
OPERATORS: dict[str, Callable[..., CurvatureOperator]] = {
    "hessian": HessianOperator,
    "gauss_newton": GaussNewtonOperator,
    "gradient_outer_product": GradientOuterProductOperator,
    "finite_difference": FiniteDifferenceOperator,
    "kfac": KFACOperator,
}
SOLVERS: dict[str, Callable[[], Any]] = {
    "Identity": lambda: Identity(damping=1e-2),
    "Neumann(10)": lambda: Neumann(terms=10, damping=1e-2),
    "ConjugateGradient(10)": lambda: ConjugateGradient(max_iterations=10, damping=1e-2),
    "MinimumResidual(10)": lambda: MinimumResidual(max_iterations=10, damping=1e-2),
    "Nystrom(10)": lambda: Nystrom(rank=10, damping=1e-2),
    "Amortized(2)": lambda: Amortized(products=2, damping=1e-2),
}


class Classifier(BilevelLightningModule, L.LightningModule):
    """A network on 28 × 28 pixels with one weight for each training example."""

    weights: SampleWeights

    def __init__(self, model: str, optimizer: str) -> None:
        super().__init__()
        self.net = MODELS[model]()
        self.optimizer = optimizer
        self.register_hyperparameter("weights", SampleWeights(EXAMPLES))

    def inner_loss(self, batch: Sequence[Tensor]) -> Tensor:
        """Returns the mean of the weighted losses."""
        x, y, index = batch
        losses = F.cross_entropy(self.mark_outputs(self.net(x)), y, reduction="none")
        return (self.weights(index) * losses).mean()

    def outer_loss(self, batch: Sequence[Tensor]) -> Tensor:
        """Returns the mean of the losses on other examples."""
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Returns the optimizer of the network's weights."""
        return OPTIMIZERS[self.optimizer](self.inner_parameters())


class Diagonal(CurvatureOperator):
    """A diagonal matrix: products cost next to nothing, so that a solve shows the solver's own cost."""

    def __init__(self, values: Tensor) -> None:
        self.values, self.size, self.dtype, self.device = values, len(values), values.dtype, values.device

    def _product(self, v: Tensor) -> Tensor:
        return self.values * v


def images(count: int, seed: int) -> TensorDataset:
    """Returns random pixels and labels: costs do not depend on what the images show."""
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(
        torch.rand(count, 1, 28, 28, generator=generator), torch.randint(10, (count,), generator=generator)
    )


class Bench:
    """A module, a batch and its losses, on which the cases run.

    Args:
        model: Name of the network.
        optimizer: Name of the optimizer of its weights.
    """

    def __init__(self, model: str, optimizer: str = "SGD") -> None:
        torch.manual_seed(0)
        self.model, self.optimizer = model, optimizer
        self.module = Classifier(model, optimizer)
        x, y = images(BATCH, 1).tensors
        self.batch = (x, y, torch.arange(BATCH))
        self.parameters = list(self.module.inner_parameters())
        self.hyperparameters = list(self.module.hyperparameters())

    def inner_loss(self) -> Tensor:
        """Returns the training loss of the fixed batch."""
        return self.module.inner_loss(self.batch)

    def outer_loss(self) -> Tensor:
        """Returns the outer loss of the fixed batch."""
        return self.module.outer_loss(self.batch)

    def gradient(self) -> Any:
        """Returns the training gradient: the unit of all costs."""
        return torch.autograd.grad(self.inner_loss(), self.parameters)

    def vector(self) -> Tensor:
        """Returns a random vector, [n]."""
        size = sum(parameter.numel() for parameter in self.parameters)
        return torch.randn(size, generator=torch.Generator().manual_seed(2))

    def operator(self, name: str) -> CurvatureOperator:
        """Returns the curvature of the training loss; KFAC knows no BatchNorm and leaves it out."""
        layers = (nn.Linear, nn.Conv2d)
        if name == "kfac":
            known = [p for layer in self.module.net if isinstance(layer, layers) for p in layer.parameters()]
            return KFACOperator(self.inner_loss, known)
        return OPERATORS[name](self.inner_loss, self.parameters)

    def fit(self, callback: L.Callback | None) -> list[float]:
        """Trains for some batches; returns the seconds that each of the warm ones took, callbacks included."""
        torch.manual_seed(0)
        clock = Clock()
        trainer = L.Trainer(
            accelerator="cpu",
            max_steps=BATCHES,
            callbacks=[clock.start, *([] if callback is None else [callback]), clock.stop],
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            limit_val_batches=0,
        )
        loader = DataLoader(IndexedDataset(images(EXAMPLES, 3)), BATCH, shuffle=True)
        trainer.fit(Classifier(self.model, self.optimizer), loader)
        return clock.seconds[2:]


class Clock:
    """Two callbacks that measure each training batch: `start` goes before all others, `stop` behind them."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.start, self.stop = _Start(self), _Stop(self)
        self.began = 0.0


class _Start(L.Callback):
    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_train_batch_start(self, *_: Any) -> None:
        self.clock.began = time.process_time()


class _Stop(L.Callback):
    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_train_batch_end(self, *_: Any) -> None:
        self.clock.seconds.append(time.process_time() - self.clock.began)


@dataclass
class Call:
    """A function without arguments, whose cost is the time of a call."""

    bench: Bench
    run: Callable[[], Any]

    def cost(self) -> float:
        """Returns the time of a call over that of a training gradient."""
        unit = _seconds(self.bench.gradient)
        return _seconds(self.run) / statistics.mean([unit, _seconds(self.bench.gradient)])

    def once(self) -> None:
        """Makes one call."""
        self.run()

    def memory(self) -> float:
        """Returns the memory that a call needs over that of a training gradient."""
        return peak_bytes(self.run) / peak_bytes(self.bench.gradient)


@dataclass
class Callback:
    """A callback that acts on every batch, whose cost is what it adds to a batch."""

    bench: Bench
    make: Callable[[], L.Callback]

    def cost(self) -> float:
        """Returns the time that the callback adds to a batch over that of a training gradient."""
        plain = self.bench.fit(None)
        acting = self.bench.fit(self.make())
        plain += self.bench.fit(None)
        return (statistics.median(acting) - statistics.median(plain)) / _seconds(self.bench.gradient)

    def once(self) -> None:
        """Trains for some batches."""
        self.bench.fit(self.make())

    def memory(self) -> float:
        """Returns what the callback adds to the memory that training needs, over that of a training gradient."""
        added = peak_bytes(self.once) - peak_bytes(lambda: self.bench.fit(None))
        return added / peak_bytes(self.bench.gradient)


Case = Call | Callback


def _seconds(run: Callable[[], Any]) -> float:
    calls, began = 0, time.process_time()
    while (passed := time.process_time() - began) < LEAST_SECONDS:
        run()
        calls += 1
    return passed / calls


def cases() -> dict[str, Callable[[], Case]]:
    """Returns all cases, each of which is set up when it is called."""
    found: dict[str, Callable[[], Case]] = {}
    for model in MODELS:
        for optimizer in OPTIMIZERS:
            for what, make in _callbacks().items():
                name = f"{what}, {model}, {optimizer}"
                found[name] = lambda model=model, optimizer=optimizer, make=make: Callback(
                    Bench(model, optimizer), make
                )
        for curvature in OPERATORS:
            found[f"{curvature}: set up, {model}"] = lambda model=model, curvature=curvature: _setting_up(
                Bench(model), curvature
            )
            found[f"{curvature}: product, {model}"] = lambda model=model, curvature=curvature: _product(
                Bench(model), curvature
            )
        for solver, make_solver in SOLVERS.items():
            found[f"hypergradient by {solver}, {model}"] = lambda model=model, make_solver=make_solver: _hypergradient(
                Bench(model), make_solver()
            )
    for solver, make_solver in SOLVERS.items():
        found[f"{solver} on a diagonal, perceptron"] = lambda make_solver=make_solver: _on_a_diagonal(make_solver())
    found["Direct with kfac, perceptron"] = _direct
    found["lanczos(30) on a diagonal, perceptron"] = lambda: _spectrum(
        lambda operator: lanczos(operator, max_iterations=30, rtol=0.0)
    )
    found["power_iteration(30) on a diagonal, perceptron"] = lambda: _spectrum(
        lambda operator: power_iteration(operator, max_iterations=30, rtol=0.0)
    )
    return found


def _callbacks() -> dict[str, Callable[[], L.Callback]]:
    return {
        "hyper step": lambda: IFTHypergradient(
            1, outer_dataloader=DataLoader(images(EXAMPLES, 4), BATCH), on_failure="use"
        ),
        "measurement": lambda: SharpnessMonitor(1, max_overhead=None),
        "look": lambda: ExactGeN(1, final_decay=0.0),
        "look by hessian": lambda: ExactGeN(1, final_decay=0.0, curvature="hessian"),
        "look by gauss_newton": lambda: ExactGeN(1, final_decay=0.0, curvature="gauss_newton"),
    }


def _setting_up(bench: Bench, curvature: str) -> Case:
    return Call(bench, lambda: bench.operator(curvature))


def _product(bench: Bench, curvature: str) -> Case:
    operator = bench.operator(curvature)
    v = bench.vector()[: operator.size]
    return Call(bench, lambda: operator.matvec(v))


def _hypergradient(bench: Bench, solver: Any) -> Case:
    def run() -> Any:
        return implicit_hypergradient(
            bench.inner_loss,
            bench.outer_loss,
            bench.parameters,
            bench.hyperparameters,
            curvature="gauss_newton",
            solver=solver,
            diagnosed=False,
        )

    return Call(bench, run)


def _diagonal(bench: Bench) -> Diagonal:
    return Diagonal(torch.linspace(0.01, 1.0, len(bench.vector())))


def _on_a_diagonal(solver: Any) -> Case:
    bench = Bench("perceptron")
    operator, b = _diagonal(bench), bench.vector()
    return Call(bench, lambda: solver.solve(operator, b))


def _direct() -> Case:
    bench = Bench("perceptron")
    operator, b = bench.operator("kfac"), bench.vector()
    return Call(bench, lambda: Direct(damping=1e-3).solve(operator, b))


def _spectrum(run: Callable[[CurvatureOperator], Any]) -> Case:
    bench = Bench("perceptron")
    operator = _diagonal(bench)
    return Call(bench, lambda: run(operator))


def peak_bytes(run: Callable[[], Any]) -> int:
    """Returns how far a call raises the memory that tensors hold, by the profiler's record of allocations."""
    gc.collect()  # garbage of earlier calls, freed inside this one, would hide what it needs
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(errors="replace"))["traceEvents"]
    changes = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]")
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak


def serve() -> None:
    """Answers the parent's requests, one JSON object a line, until there are no more."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to stderr
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    available, case = cases(), None

    def answer(**content: Any) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    answer(file=lightning_ifthpo.__file__, torch=torch.__version__, cases=list(available))
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if request["what"] == "set up":
                case = available[request["case"]]()
                case.once()
                answer()
            elif request["what"] == "cost":
                assert case is not None
                answer(cost=case.cost())
            elif request["what"] == "memory":
                assert case is not None
                answer(memory=case.memory())
        except Exception as error:  # such as a case that this version does not have
            answer(error=f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    serve()
