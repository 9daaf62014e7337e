"""What is measured, and a process that measures it when the parent asks.

Each cost is a ratio to a training gradient, which is measured in the same process and in the same round. On a CPU the
clock counts the processor time of this process, which has one thread, so that other programs on the machine hardly
matter. On a GPU it counts the time until the device is done. Only public names are used, so that the same file measures
older versions of the package: the parent sets PYTHONPATH to choose one, and DEVICE to choose a device.
"""

from __future__ import annotations

import gc
import json
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.parametrize import register_parametrization
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import resnet18

import lightning_ifthpo
import lightning_ifthpo.solvers
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
from lightning_ifthpo.hyperparameters import IndexedDataset, InputNoise, SampleWeights
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

DEVICE = torch.device(os.environ.get("DEVICE", "cpu"))
EXAMPLES = 2048
"""Training examples, each with a weight of its own as hyperparameter."""
BATCHES = 10
"""Batches of each fit; the first two are not counted, since the callbacks start cold there."""
LEAST_SECONDS = 0.1
"""Calls are repeated for at least this long, so that one slow call does not decide."""


class Transformer(nn.Module):
    """Four layers of width 128, which predict the 64 characters of a text."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(64, 128), nn.Parameter(0.02 * torch.randn(64, 128))
        layer = nn.TransformerEncoderLayer(128, 4, 512, dropout=0.0, batch_first=True, norm_first=True)
        self.layers, self.head = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False), nn.Linear(128, 64)

    def forward(self, tokens: Tensor) -> Tensor:
        """Returns logits [B, 64, 64] for tokens [B, 64]."""
        logits: Tensor = self.head(self.layers(self.embed(tokens) + self.position))
        return logits


class SentenceClassifier(nn.Module):
    """A transformer that sorts sentences into ten classes; by default of the size of MiniLM-L6, 22 million weights."""

    def __init__(self, width: int = 384, depth: int = 6) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(30_522, width), nn.Parameter(0.02 * torch.randn(512, width))
        layer = nn.TransformerEncoderLayer(width, 12, 4 * width, dropout=0.0, batch_first=True)
        self.layers, self.head = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False), nn.Linear(width, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        """Returns logits [B, 10] for tokens [B, T]."""
        features = self.layers(self.embed(tokens) + self.position[: tokens.shape[1]])
        logits: Tensor = self.head(features.mean(1))
        return logits


class LowRank(nn.Module):
    """Adds a trainable matrix of rank eight to a frozen one (LoRA)."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.left = nn.Parameter(torch.zeros(len(weight), 8))
        self.right = nn.Parameter(0.02 * torch.randn(8, weight.shape[1]))

    def forward(self, weight: Tensor) -> Tensor:
        """Returns the sum."""
        return weight + self.left @ self.right


def fine_tuned() -> nn.Module:
    """Returns the classifier of sentences with its attention fine-tuned by LoRA, and all else frozen but the head."""
    net = SentenceClassifier()
    net.requires_grad_(False)
    net.head.requires_grad_(True)
    for layer in net.layers.layers:
        register_parametrization(layer.self_attn, "in_proj_weight", LowRank(layer.self_attn.in_proj_weight))
    return net


@dataclass
class Workload:
    """A network with data of its kind.

    Attributes:
        net: Makes the network.
        batch: Examples of a batch.
        shape: Shape of an input.
        vocabulary: Number of different tokens, if inputs are tokens.
        classes: Number of different labels.
        per_token: Whether each token has a label.
    """

    net: Callable[[], nn.Module]
    batch: int
    shape: tuple[int, ...]
    vocabulary: int = 0
    classes: int = 10
    per_token: bool = False

    def data(self, count: int, seed: int) -> TensorDataset:
        """Returns random inputs and labels: costs do not depend on what they show."""
        generator, shape = torch.Generator().manual_seed(seed), (count, *self.shape)
        if self.vocabulary:
            inputs = torch.randint(self.vocabulary, shape, generator=generator)
        else:
            inputs = torch.rand(shape, generator=generator)
        labels = torch.randint(self.classes, shape if self.per_token else (count,), generator=generator)
        return TensorDataset(inputs, labels)


MODELS: dict[str, Workload] = {
    "perceptron": Workload(
        lambda: nn.Sequential(
            nn.Flatten(), nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)
        ),
        batch=128,
        shape=(1, 28, 28),
    ),
    "convolutions": Workload(
        lambda: nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(32 * 49, 10)),
        ),
        batch=64,
        shape=(1, 28, 28),
    ),
    "transformer": Workload(Transformer, batch=16, shape=(64,), vocabulary=64, classes=64, per_token=True),
    "ResNet-18": Workload(lambda: resnet18(num_classes=10), batch=16, shape=(3, 32, 32)),
    "MiniLM-sized": Workload(SentenceClassifier, batch=16, shape=(64,), vocabulary=30_522),
    "MiniLM-sized with LoRA": Workload(fine_tuned, batch=16, shape=(64,), vocabulary=30_522),
}
SMALL = ("perceptron", "convolutions")
IMAGES = (*SMALL, "ResNet-18")
LARGE = ("MiniLM-sized", "MiniLM-sized with LoRA")
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
    """A network with one weight for each training example."""

    weights: SampleWeights

    def __init__(self, workload: Workload, optimizer: str) -> None:
        super().__init__()
        self.net = workload.net()
        self.optimizer = optimizer
        self.register_hyperparameter("weights", SampleWeights(EXAMPLES))

    def inner_loss(self, batch: Sequence[Tensor]) -> Tensor:
        """Returns the mean of the weighted losses."""
        x, y, index = batch
        return (self.weights(index) * losses_of(self.mark_outputs(self.net(x)), y)).mean()

    def outer_loss(self, batch: Sequence[Tensor]) -> Tensor:
        """Returns the mean of the losses on other examples."""
        return losses_of(self.net(batch[0]), batch[1]).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Returns the optimizer of the network's weights."""
        return OPTIMIZERS[self.optimizer](self.inner_parameters())


class NoisyClassifier(Classifier):
    """A network with a scale of noise for each channel of its inputs, in front of the model."""

    noise: InputNoise

    def __init__(self, workload: Workload, optimizer: str) -> None:
        super().__init__(workload, optimizer)
        self.register_hyperparameter("noise", InputNoise((workload.shape[0], 1, 1)))

    def inner_loss(self, batch: Sequence[Tensor]) -> Tensor:
        """Returns the mean of the weighted losses on noisy inputs."""
        return super().inner_loss([self.noise(batch[0]), *batch[1:]])


def losses_of(logits: Tensor, y: Tensor) -> Tensor:
    """Returns the loss of each example, [B], for logits [B, C] or [B, T, C]."""
    return F.cross_entropy(logits.flatten(0, -2), y.flatten(), reduction="none").view(len(y), -1).mean(1)


class Diagonal(CurvatureOperator):
    """A diagonal matrix: products cost next to nothing, so that a solve shows the solver's own cost."""

    def __init__(self, values: Tensor) -> None:
        self.values, self.size, self.dtype, self.device = values, len(values), values.dtype, values.device

    def _product(self, v: Tensor) -> Tensor:
        return self.values * v


class Bench:
    """A module, a batch and its losses, on which the cases run.

    Args:
        model: Name of the network.
        optimizer: Name of the optimizer of its weights.
        kind: What is tuned.
    """

    def __init__(self, model: str, optimizer: str = "SGD", kind: type[Classifier] = Classifier) -> None:
        torch.manual_seed(0)
        self.optimizer, self.kind, self.workload = optimizer, kind, MODELS[model]
        self.module = kind(self.workload, optimizer).to(DEVICE)
        self.data = IndexedDataset(self.workload.data(EXAMPLES, 3))
        x, y = (tensor.to(DEVICE) for tensor in self.workload.data(self.workload.batch, 1).tensors)
        self.batch = (x, y, torch.arange(self.workload.batch, device=DEVICE))
        self.parameters = [weight for weight in self.module.inner_parameters() if weight.requires_grad]
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
        return torch.randn(size, generator=torch.Generator().manual_seed(2)).to(DEVICE)

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
            accelerator="gpu" if DEVICE.type == "cuda" else "cpu",
            devices=1,
            max_steps=BATCHES,
            callbacks=[clock.start, *([] if callback is None else [callback]), clock.stop],
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            limit_val_batches=0,
        )
        loader = DataLoader(self.data, self.workload.batch, shuffle=True)
        trainer.fit(self.kind(self.workload, self.optimizer), loader)
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
        self.clock.began = now()


class _Stop(L.Callback):
    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_train_batch_end(self, *_: Any) -> None:
        self.clock.seconds.append(now() - self.clock.began)


@dataclass
class Call:
    """A function without arguments, whose cost is the time of a call."""

    bench: Bench
    run: Callable[[], Any]

    def cost(self) -> tuple[float, float]:
        """Returns the time of a call over that of a training gradient, and its seconds."""
        unit = seconds_of(self.bench.gradient)
        seconds = seconds_of(self.run)
        return seconds / statistics.mean([unit, seconds_of(self.bench.gradient)]), seconds

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

    def cost(self) -> tuple[float, float]:
        """Returns the time that the callback adds to a batch over that of a training gradient, and its seconds."""
        plain = self.bench.fit(None)
        acting = self.bench.fit(self.make())
        plain += self.bench.fit(None)
        seconds = statistics.median(acting) - statistics.median(plain)
        return seconds / seconds_of(self.bench.gradient), seconds

    def once(self) -> None:
        """Trains for some batches."""
        self.bench.fit(self.make())

    def memory(self) -> float:
        """Returns what the callback adds to the memory that training needs, over that of a training gradient."""
        added = peak_bytes(self.once) - peak_bytes(lambda: self.bench.fit(None))
        return added / peak_bytes(self.bench.gradient)


Case = Call | Callback


def now() -> float:
    """Returns the seconds of the clock, when the device is done."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def seconds_of(run: Callable[[], Any]) -> float:
    """Returns the seconds of a call, the mean over calls of at least `LEAST_SECONDS`."""
    calls, began = 0, now()
    while (passed := now() - began) < LEAST_SECONDS:
        run()
        calls += 1
    return passed / calls


def cases() -> dict[str, Callable[[], Case]]:
    """Returns all cases, each of which is set up when it is called."""
    found: dict[str, Callable[[], Case]] = {}
    for model in MODELS:
        for optimizer in ("AdamW",) if model in LARGE else OPTIMIZERS:
            for what, make in _callbacks(MODELS[model]).items():
                if model in LARGE and "hyper step" not in what:
                    continue  # the others take minutes
                name = f"{what}, {model}, {optimizer}"
                found[name] = lambda model=model, optimizer=optimizer, make=make: Callback(
                    Bench(model, optimizer), make
                )
        if model in IMAGES:
            found[f"hyper step with noise before the model, {model}, SGD"] = lambda model=model: Callback(
                Bench(model, "SGD", NoisyClassifier), _callbacks(MODELS[model])["hyper step"]
            )
        for curvature in OPERATORS if model in SMALL else () if model in LARGE else ("hessian", "gauss_newton"):
            found[f"{curvature}: set up, {model}"] = lambda model=model, curvature=curvature: _setting_up(
                Bench(model), curvature
            )
            found[f"{curvature}: product, {model}"] = lambda model=model, curvature=curvature: _product(
                Bench(model), curvature
            )
        for solver, make_solver in SOLVERS.items() if model in SMALL else ():
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


def _callbacks(workload: Workload) -> dict[str, Callable[[], L.Callback]]:
    @cache
    def data() -> DataLoader[Any]:
        return DataLoader(workload.data(EXAMPLES, 4), workload.batch)

    def tuning(solver: str | None) -> L.Callback:
        # SAMA is looked up when it is needed, because older versions have none
        chosen = {
            None: lambda: None,
            "Identity": lambda: Identity(step_size=0.05),
            "SAMA": lambda: lightning_ifthpo.solvers.SAMA(),
        }[solver]()
        return IFTHypergradient(1, solver=chosen, outer_dataloader=data(), on_failure="use")

    return {
        "hyper step": lambda: tuning(None),
        "hyper step by Identity": lambda: tuning("Identity"),
        "hyper step by SAMA": lambda: tuning("SAMA"),
        "measurement": lambda: SharpnessMonitor(1, max_overhead=None),
        "look": lambda: ExactGeN(1, final_decay=0.0),
        "look by hessian": lambda: ExactGeN(1, final_decay=0.0, curvature="hessian"),
        "look by gauss_newton": lambda: ExactGeN(1, final_decay=0.0, curvature="gauss_newton"),
    }


def _setting_up(bench: Bench, curvature: str) -> Case:
    return Call(bench, lambda: bench.operator(curvature))


def _product(bench: Bench, curvature: str) -> Case:
    with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
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
    return Diagonal(torch.linspace(0.01, 1.0, len(bench.vector()), device=DEVICE))


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
    """Returns how far a call raises the memory that tensors hold, by the record of allocations."""
    gc.collect()  # garbage of earlier calls, freed inside this one, would hide what it needs
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
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


def about() -> dict[str, str]:
    """Returns what the figures depend on: device and versions."""
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"one core ({platform.machine()})"
    return {"device": name, "torch": torch.__version__, "lightning": L.__version__}


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

    answer(file=lightning_ifthpo.__file__, about=about(), cases=list(available))
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if request["what"] == "set up":
                case = available[request["case"]]()
                case.once()
                answer()
            elif request["what"] == "cost":
                assert case is not None
                cost, seconds = case.cost()
                answer(cost=cost, seconds=seconds)
            elif request["what"] == "memory":
                assert case is not None
                answer(memory=case.memory())
        except Exception as error:  # such as a case that this version does not have
            answer(error=f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    serve()
