"""Millions of hyperparameters overfit 50 validation images: training and validation accuracy 100 %, test far below.

One weight decay for each weight of a linear model, a perceptron, an AlexNet and a ResNet18 is tuned inside a single
`trainer.fit`, on 50 training and 50 validation images (Lorraine, Vicol, Duvenaud 2019, "Overfitting small problems").
There are as many hyperparameters as weights, so they can fit the validation images as weights fit the training images:
with ResNet18 all but one image on one of three seeds, else all. That shows that hypergradients work at this size.

Accuracy on images that so many decays were tuned on says nothing any more. Beside each stand the same training with all
decays left as they were and, again without tuning, training on both sets of images. The latter classifies test images
as well as the tuned network, or up to four points better: so many hyperparameters make tuning another kind of training.
Test accuracy is far below 100 %, but not near random, as the slides have it.

As in the slides, the inverse curvature is the identity; `--solver amortized` takes the default of the package. A last
panel shows the memory of one hypergradient: it does not depend on the number of Neumann terms, whereas unrolled
differentiation keeps the weights of every step.

AlexNet and ResNet18 are those of torchvision, with a first layer for small images. AlexNet has a smaller output layer,
no dropout, and He's initialization, without which it hardly starts to learn. Settings were chosen on mnist5k, seeds 0
to 2, by training and validation accuracy; on other data sets, which torchvision reads, nothing was measured.

Run:
    python examples/overfit_validation.py                                       # one minute on two cores
    python examples/overfit_validation.py --seeds 0 1 2 --models linear mlp alexnet resnet18  # the expected figures
    python examples/overfit_validation.py --models linear mlp --solver amortized
    python examples/overfit_validation.py --dataset cifar10 --root data --download
"""

from __future__ import annotations

import argparse
import json
import math
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import distill_dataset as distillation
import lightning as L
import torch
import torch.nn.functional as F
import torchvision  # type: ignore[import-untyped]
from distill_dataset import Examples
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from lightning_ifthpo import BilevelLightningModule, IFTHypergradient, implicit_hypergradient, unrolled_hypergradient
from lightning_ifthpo.curvature import mark_outputs
from lightning_ifthpo.hyperparameters import WeightDecay
from lightning_ifthpo.solvers import Identity, Neumann

TRAINING, VALIDATION, TEST = 50, 50, 500  # images
HIDDEN = 256
START_AFTER = 10  # steps: validation gradients of random weights say nothing
DECAY = 1e-3  # of each weight, at the start
HYPER_LEARNING_RATE = 0.2
RECORD_EVERY = 5  # steps
TERMS = (1, 3, 10, 30, 100)  # of the Neumann series, and steps of unrolling, whose memory is measured


def linear(shape: Sequence[int], classes: int) -> nn.Module:
    """Returns logistic regression."""
    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), classes))


def perceptron(shape: Sequence[int], classes: int) -> nn.Module:
    """Returns a network with one hidden layer."""
    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, classes))


def alexnet(shape: Sequence[int], classes: int) -> nn.Module:
    """Returns an AlexNet for small images."""
    net = torchvision.models.alexnet()
    net.features[0] = nn.Conv2d(shape[0], 64, kernel_size=5, stride=2, padding=2)
    net.features[12] = nn.Identity()  # the last pooling: two pixels by two are left before it
    net.avgpool = nn.AdaptiveAvgPool2d(2)
    net.classifier = nn.Linear(256 * 2 * 2, classes)
    for layer in net.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    return net  # type: ignore[no-any-return]


def resnet18(shape: Sequence[int], classes: int) -> nn.Module:
    """Returns a ResNet18 for images with any number of channels."""
    # Each batch is the whole training set: momentum 0.1 would only let the running statistics lag ten steps behind.
    norm = partial(nn.BatchNorm2d, momentum=0.5)
    net = torchvision.models.resnet18(num_classes=classes, norm_layer=norm)
    net.conv1 = nn.Conv2d(shape[0], 64, kernel_size=7, stride=2, padding=3, bias=False)
    return net  # type: ignore[no-any-return]


class Model(NamedTuple):
    """A network, and how it is trained."""

    title: str
    build: Callable[[Sequence[int], int], nn.Module]
    learning_rate: float
    maximum_decay: float
    steps: int


MODELS = {
    "linear": Model("Linear", linear, 3e-3, 1.0, 200),
    "mlp": Model("Perceptron", perceptron, 1e-3, 1.0, 100),
    # A maximum of 1 undoes what was learned on seed 1 (training accuracy 0.58), one of 0.01 fits less (0.90).
    "alexnet": Model("AlexNet", alexnet, 3e-4, 0.1, 80),
    # Larger decays move weights so fast that running statistics do not follow: training accuracy falls in eval mode.
    "resnet18": Model("ResNet18", resnet18, 3e-4, 0.01, 50),
}
SOLVERS: dict[str, dict[str, Any]] = {
    # The identity needs the curvature only for the residual that is logged, and has the Hessian for less.
    "identity": {"solver": Identity(), "curvature": "hessian"},
    "amortized": {},  # the default, with Gauss–Newton, as outputs are marked
}
PARTS = {"training": "tab:blue", "validation": "tab:orange", "test": "tab:red"}
# Accuracies on training, validation and test images after the last step, means of seeds 0, 1 and 2: with decays tuned,
# with decays left as they were, and with these on training and validation images together.
EXPECTED = {
    "linear": {"tuned": (1.0, 1.0, 0.725), "not tuned": (1.0, 0.653, 0.627), "trained on both": (1.0, 1.0, 0.733)},
    "mlp": {"tuned": (1.0, 1.0, 0.742), "not tuned": (1.0, 0.667, 0.637), "trained on both": (1.0, 1.0, 0.751)},
    "alexnet": {"tuned": (1.0, 1.0, 0.801), "not tuned": (1.0, 0.733, 0.68), "trained on both": (1.0, 1.0, 0.816)},
    "resnet18": {"tuned": (1.0, 0.993, 0.673), "not tuned": (1.0, 0.567, 0.535), "trained on both": (1.0, 1.0, 0.711)},
}
# Of peak memory, in copies of the weights per term or step: a series keeps a term and a sum, however many there were.
GROWTH = {"Neumann series": 0.0, "unrolled": 1.0}


class Split(NamedTuple):
    """Images [N, channels, height, width] with labels."""

    train: Examples
    validation: Examples
    test: Examples
    classes: int

    @property
    def merged(self) -> Split:
        """The same with the validation images among those to train on."""
        images, labels = (torch.cat(pair) for pair in zip(self.train, self.validation, strict=True))
        return self._replace(train=(images, labels))


class Scores(NamedTuple):
    """Accuracies after a number of steps."""

    step: int
    training: float
    validation: float
    test: float


Runs = dict[str, list[list[Scores]]]  # for each kind of training, the history of each seed


def load_data(name: str, seed: int, root: Path, download: bool) -> Split:
    """Returns a few images of a data set, drawn at random."""
    full = distillation.load_data(name, seed, root, download)
    pairs = zip(full, (TRAINING, VALIDATION, TEST), strict=True)
    train, validation, test = ((images[:size], labels[:size]) for (images, labels), size in pairs)
    return Split(train, validation, test, full.classes)


class Overfitter(BilevelLightningModule, L.LightningModule):
    """A network with one decay for each weight, which stay as they are unless `IFTHypergradient` tunes them.

    Args:
        model: What is trained, and how.
        split: Images to train and to score it on.
    """

    decay: WeightDecay

    def __init__(self, model: Model, split: Split) -> None:
        super().__init__()
        self.net = model.build(split.train[0].shape[1:], split.classes)
        self.learning_rate = model.learning_rate
        self.split = split
        self.history: list[Scores] = []
        decay = WeightDecay(self.net, "weight", initial=DECAY, maximum=model.maximum_decay)
        self.register_hyperparameter("decay", decay)

    def inner_loss(self, batch: Examples) -> Tensor:
        """Returns what the weights minimize."""
        images, labels = batch
        loss: Tensor = F.cross_entropy(mark_outputs(self.net(images)), labels) + self.decay()
        return loss

    def outer_loss(self, batch: Examples) -> Tensor:
        """Returns what the decays minimize."""
        images, labels = batch
        return F.cross_entropy(self.net(images), labels)

    def outer_dataloader(self) -> list[Examples]:
        """Returns the validation images as one batch."""
        return [self.split.validation]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Returns the optimizer of the weights."""
        return torch.optim.Adam(self.inner_parameters(), lr=self.learning_rate)

    def configure_hyper_optimizer(self) -> torch.optim.Optimizer:
        """Returns the optimizer of the decays."""
        return torch.optim.Adam(self.hyperparameters(), lr=HYPER_LEARNING_RATE)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Notes accuracies now and then, and after the last step."""
        step = batch_idx + 1
        if step % RECORD_EVERY == 0 or step == self.trainer.num_training_batches:
            self.net.eval()
            parts = (self.split.train, self.split.validation, self.split.test)
            self.history.append(Scores(step, *(distillation.accuracy(self.net, examples) for examples in parts)))
            self.net.train()


def train(model: Model, split: Split, seed: int, steps: int, solver: str | None) -> Overfitter:
    """Returns a network trained with full batches; its decays are tuned if there is a solver."""
    torch.manual_seed(seed)
    module = Overfitter(model, split)
    callbacks: list[L.Callback] = []
    if solver is not None:
        callbacks.append(IFTHypergradient(1, start_after_batches=START_AFTER, **SOLVERS[solver]))
    trainer = L.Trainer(
        accelerator="cpu",  # where the figures were measured
        max_epochs=1,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(module, DataLoader([split.train] * steps, batch_size=None))  # type: ignore[arg-type]
    return module


class PeakMemory(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the tensors that are made inside the block and still alive; `peak` is the most.

    Memory that a kernel takes for itself and returns at its end is not seen.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        known = {storage.data_ptr() for storage in storages((args, kwargs))}
        for storage in storages(result):
            if storage.data_ptr() not in known:  # else a view, or changed in place
                known.add(storage.data_ptr())
                self.add(storage.nbytes())
                weakref.finalize(storage, self.add, -storage.nbytes())
        return result

    def add(self, size: int) -> None:
        """Counts bytes that are taken, or given back."""
        self.live += size
        self.peak = max(self.peak, self.live)


def storages(values: Any) -> Iterator[torch.UntypedStorage]:
    """Yields the memory of all tensors in nested tuples, lists and dicts."""
    return (value.untyped_storage() for value in tree_leaves(values) if isinstance(value, Tensor))


def measure_memory(split: Split, seed: int) -> dict[str, list[float]]:
    """Returns the peak memory of one hypergradient of the perceptron, in copies of its weights, for each of TERMS."""
    torch.manual_seed(seed)
    module = Overfitter(MODELS["mlp"], split)
    weights, decays = list(module.inner_parameters()), list(module.hyperparameters())
    losses = (lambda: module.inner_loss(split.train), lambda: module.outer_loss(split.validation), weights, decays)
    size = sum(weight.nbytes for weight in weights)
    peaks: dict[str, list[float]] = {name: [] for name in GROWTH}
    for count in TERMS:
        solver = Neumann(count, step_size=1e-2, safeguard=False)  # all terms, whether they shrink or not
        with PeakMemory() as memory:
            implicit_hypergradient(*losses, solver=solver, diagnosed=False)
        peaks["Neumann series"].append(memory.peak / size)
        with PeakMemory() as memory:
            unrolled_hypergradient(*losses, steps=count, lr=1e-2)
        peaks["unrolled"].append(memory.peak / size)
    return peaks


def draw(runs: dict[str, Runs], decays: dict[str, int], memory: dict[str, list[float]], path: Path) -> None:
    """Saves accuracies on the way, means over seeds, and memory against the number of terms."""
    figure = Figure(figsize=(3.2 * (len(runs) + 1), 3.6), layout="constrained")
    *panels, last = figure.subplots(1, len(runs) + 1)
    for panel, (name, kinds) in zip(panels, runs.items(), strict=True):
        steps, *curves = torch.tensor(kinds["tuned"]).mean(0).T
        for curve, (part, color) in zip(curves, PARTS.items(), strict=True):
            panel.plot(steps, curve, color=color, linewidth=2, label=part)
        for kind, part in (("not tuned", "validation"), ("trained on both", "test")):
            curve = torch.tensor(kinds[kind]).mean(0)[:, Scores._fields.index(part)]
            panel.plot(steps, curve, "--", color=PARTS[part], label=f"{part}, {kind}")
        panel.set(title=f"{MODELS[name].title}, {decays[name]:,} decays", xlabel="training steps", ylim=(0.0, 1.05))
        panel.set_xlim(left=0)
        panel.label_outer()
    panels[0].set_ylabel("accuracy")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=5, frameon=False)
    for (method, copies), style in zip(memory.items(), ("o-", "s--"), strict=True):
        last.loglog(TERMS, copies, style, color="black", label=method)
    last.set(title="Peak memory, perceptron", xlabel="terms or unrolled steps", ylabel="copies of the weights")
    last.set_ylim(bottom=1.0)
    last.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)


def main(argv: list[str] | None = None) -> dict[str, dict[str, float | None]]:
    """Trains each model in three ways for each seed; returns what the last line says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=["linear", "mlp", "alexnet"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, help="of training, for every model in place of its own number")
    parser.add_argument("--solver", choices=list(SOLVERS), default="identity")
    parser.add_argument("--dataset", choices=["mnist5k", *distillation.TORCHVISION], default="mnist5k")
    parser.add_argument("--root", type=Path, default=Path("data"), help="folder of the data sets of torchvision")
    parser.add_argument("--download", action="store_true", help="fetch the data set into --root")
    parser.add_argument("--output", type=Path, default=Path("results"), help="folder for the picture")
    args = parser.parse_args(argv)
    distillation.silence_lightning()
    torch.set_num_threads(1)  # layers this small gain little from a second, and stall on a busy machine
    splits = {seed: load_data(args.dataset, seed, args.root, args.download) for seed in args.seeds}
    runs: dict[str, Runs] = {name: {kind: [] for kind in EXPECTED[name]} for name in args.models}
    decays: dict[str, int] = {}
    result: dict[str, dict[str, float | None]] = {}
    for name, kinds in runs.items():
        model = MODELS[name]
        for (seed, split), (kind, histories) in product(splits.items(), kinds.items()):
            began = time.perf_counter()
            images = split.merged if kind == "trained on both" else split
            module = train(model, images, seed, args.steps or model.steps, args.solver if kind == "tuned" else None)
            histories.append(module.history)
            decays[name] = sum(decay.numel() for decay in module.hyperparameters())
            print(f"{model.title:11}seed {seed}{decays[name]:>12,} decays, {kind:15}", end="")
            print("   {} steps: training {:.2f}, validation {:.2f}, test {:.3f}".format(*module.history[-1]), end="")
            print(f"   {time.perf_counter() - began:.0f} s", flush=True)
        for kind, histories in kinds.items():
            ends = torch.tensor(histories)[:, -1, 1:].mean(0)
            for part, value, expected in zip(PARTS, ends.tolist(), EXPECTED[name][kind], strict=True):
                known = expected if args.dataset == "mnist5k" else None  # measured there only
                result[f"{name}, {kind}, {part}"] = {"measured": round(value, 3), "expected": known}
    memory = measure_memory(splits[args.seeds[0]], args.seeds[0])
    for method, copies in memory.items():
        shown = ", ".join(f"{copy:.1f} at {count}" for count, copy in zip(TERMS, copies, strict=True))
        print(f"{method:15} peak memory in copies of the weights: {shown}")
        growth = (copies[-1] - copies[-2]) / (TERMS[-1] - TERMS[-2])
        result[f"{method}, copies of the weights per term"] = {"measured": round(growth, 2), "expected": GROWTH[method]}
    picture = args.output / "overfit_validation.png"
    draw(runs, decays, memory, picture)
    print(f"See {picture}")
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
