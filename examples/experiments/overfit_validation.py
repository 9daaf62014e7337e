"""Millions of hyperparameters overfit 50 validation images: training and validation accuracy 100 %, test far below.

One weight decay for each weight of a linear model, a perceptron, an AlexNet and a ResNet18 is tuned inside a single
`trainer.fit`, on 50 training and 50 validation images (Lorraine, Vicol, Duvenaud 2019, "Overfitting small problems").
There are as many hyperparameters as weights, so they can fit the validation images as weights fit the training images.
That shows that hypergradients work at this size.

Accuracy on images that so many decays were tuned on no longer predicts accuracy on others. The table therefore shows
the same training with all decays left as they were and, again without tuning, training on both sets of images. The
latter classifies test images as well as the tuned network or better: so many hyperparameters make tuning another kind
of training.

As in the slides, the inverse curvature is the identity; `--solver amortized` takes the default of the package. A last
panel shows the memory of one hypergradient. It does not depend on the number of Neumann terms, whereas unrolled
differentiation keeps the weights of every step.

Settings were chosen on mnist5k, seeds 0 to 2, by training and validation accuracy; on other data sets, which
torchvision reads, nothing was measured.

    python -m examples.experiments.overfit_validation                                   # one minute on two cores
    python -m examples.experiments.overfit_validation --seeds 0 1 2 --models linear mlp alexnet resnet18
    python -m examples.experiments.overfit_validation --models linear mlp --solver amortized
    python -m examples.experiments.overfit_validation --dataset cifar10 --root data --download
"""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Iterator
from statistics import fmean
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from examples.experiments.common import (
    Figures,
    Results,
    add_data_arguments,
    conclude,
    full_batches,
    make_parser,
    markdown,
    mean,
    number,
    quiet_trainer,
    start,
)
from examples.experiments.problems.overfitting import (
    MODELS,
    START_AFTER,
    Model,
    Overfitter,
    Scores,
    Split,
    load_data,
)
from examples.experiments.style import BOUND, OTHER, OURS, OUTER, PLAIN, TEST, TRAINING, curve, page
from lightning_ifthpo import IFTHypergradient, implicit_hypergradient, unrolled_hypergradient
from lightning_ifthpo.solvers import Identity, Neumann

NAME = "overfit_validation"
TERMS = (1, 3, 10, 30, 100)  # of the Neumann series, and steps of unrolling, whose memory is measured
SOLVERS: dict[str, dict[str, Any]] = {
    # The identity takes no product with the curvature.
    "identity": {"solver": Identity(), "curvature": "hessian"},
    "amortized": {},  # the default, with Gauss–Newton, as outputs are marked
}
KINDS = ("tuned", "not tuned", "trained on both")  # of training
PARTS = ("training", "validation", "test")
CURVES = {  # of the picture; thin ones are those without tuning
    "training": ("tuned", "training", TRAINING),
    "validation": ("tuned", "validation", OUTER),
    "validation, not tuned": ("not tuned", "validation", PLAIN),
    "test": ("tuned", "test", TEST),
    "test, trained on both": ("trained on both", "test", BOUND),
}
METHODS = ("Neumann series", "unrolled")  # whose memory is measured


def train(model: Model, split: Split, seed: int, steps: int, solver: str | None) -> Overfitter:
    """Returns a network trained with full batches; its decays are tuned if there is a solver."""
    torch.manual_seed(seed)
    module = Overfitter(model, split)
    callback = None if solver is None else IFTHypergradient(1, start_after_batches=START_AFTER, **SOLVERS[solver])
    quiet_trainer([callback] if callback else []).fit(module, full_batches(split.train, steps))
    return module


class PeakMemory(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the tensors that are made inside the block and still alive; `peak` is the most.

    Memory that a kernel allocates for itself and frees at its end is not counted.
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
        """Counts bytes that are allocated, or freed."""
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
    peaks: dict[str, list[float]] = {name: [] for name in METHODS}
    for count in TERMS:
        solver = Neumann(count, step_size=1e-2, safeguard=False)  # all terms, whether they shrink or not
        with PeakMemory() as memory:
            implicit_hypergradient(*losses, solver=solver, diagnosed=False)
        peaks["Neumann series"].append(memory.peak / size)
        with PeakMemory() as memory:
            unrolled_hypergradient(*losses, steps=count, lr=1e-2)
        peaks["unrolled"].append(memory.peak / size)
    return peaks


def summary(results: Results) -> dict[str, float]:
    """Returns mean accuracies after the last step, and the growth of memory."""
    figures = {}
    for name, kinds in results["models"].items():
        for kind in KINDS:
            for part in PARTS:
                figures[f"{name}, {kind}, {part}"] = final(kinds[kind], part)
    for method, copies in results.get("memory", {}).items():
        growth = (copies[-1] - copies[-2]) / (results["terms"][-1] - results["terms"][-2])
        figures[f"{method}, copies of the weights per term"] = growth
    return figures


def final(histories: Results, part: str) -> float:
    """Returns a mean accuracy after the last step."""
    if "mean" in histories:  # of an earlier run, of which no more was kept
        return float(histories["mean"][Scores._fields.index(part) - 1])
    return mean({seed: history[-1][Scores._fields.index(part)] for seed, history in histories.items()})


def table(results: Results) -> str:
    """Returns accuracies after the last step."""
    columns = {
        "training": ("tuned", "training"),
        "validation": ("tuned", "validation"),
        "test": ("tuned", "test"),
        "not tuned: validation": ("not tuned", "validation"),
        "not tuned: test": ("not tuned", "test"),
        "trained on all 100: test": ("trained on both", "test"),
    }
    rows = []
    for name, kinds in results["models"].items():
        accuracies = [number(final(kinds[kind], part)) for kind, part in columns.values()]
        rows.append([MODELS[name].title, f"{kinds['decays']:,}", *accuracies])
    return markdown(["", "decays", *columns], rows)


def draw(results: Results) -> Figure:
    """Returns accuracies along training, and memory against the number of terms."""
    models = results["models"]
    fitted, test = (fmean(final(kinds["tuned"], part) for kinds in models.values()) for part in ("validation", "test"))
    lines = math.ceil((len(models) + 2) / 3)  # with a panel for memory and one for the legend
    figure = page(
        2.35 * lines + 0.6,
        "One decay for each weight fits 50 validation images like 50 more training images:\n"
        f"their accuracy rises to {fitted:.0%} in the mean, that of test images to {test:.0%}",
    )
    panels = figure.subplots(lines, 3, squeeze=False).ravel()
    for panel, (name, kinds) in zip(panels, models.items(), strict=False):
        for label, (kind, part, role) in CURVES.items():
            by_seed = torch.tensor(list(kinds[kind].values()))
            curve(panel, by_seed[0, :, 0].tolist(), by_seed[..., Scores._fields.index(part)], role, label=label)
        panel.set(title=f"{MODELS[name].title}, {kinds['decays']:,} decays", xlabel="training steps", ylim=(0.0, 1.05))
        panel.set_xlim(left=0)
    for panel in panels[: len(models) : 3]:
        panel.set_ylabel("accuracy")
    memory, legend, *empty = panels[len(models) :]
    for (method, copies), role in zip(results["memory"].items(), (OURS, OTHER), strict=True):
        memory.loglog(results["terms"], copies, **role.line(marker=role.marker, label=method))
    memory.set(title="Memory, in copies of the weights", xlabel="terms or unrolled steps")
    memory.set_ylim(bottom=1.0)
    memory.legend()
    legend.legend(*panels[0].get_legend_handles_labels(), loc="center", title="Accuracy on images for")
    for panel in (legend, *empty):
        panel.set_axis_off()
    return figure


def main(argv: list[str] | None = None) -> Figures:
    """Trains each model in three ways for each seed; returns what the last line says."""
    parser = make_parser(__doc__, seeds=[0])
    add_data_arguments(parser)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=["linear", "mlp", "alexnet"])
    parser.add_argument("--steps", type=int, help="of training, for every model in place of its own number")
    parser.add_argument("--solver", choices=list(SOLVERS), default="identity")
    args = parser.parse_args(argv)
    start()
    splits = {seed: load_data(args.dataset, seed, args.root, args.download) for seed in args.seeds}
    models: Results = {name: {kind: {} for kind in KINDS} for name in args.models}
    for name, kinds in models.items():
        for seed, split in splits.items():
            for kind in KINDS:
                began, model = time.perf_counter(), MODELS[name]
                images = split.merged if kind == "trained on both" else split
                solver = args.solver if kind == "tuned" else None
                module = train(model, images, seed, args.steps or model.steps, solver)
                kinds[kind][str(seed)] = [[round(score, 4) for score in scores] for scores in module.history]
                kinds["decays"] = sum(decay.numel() for decay in module.hyperparameters())
                print(f"{model.title:11}seed {seed}{kinds['decays']:>12,} decays, {kind:15}", end="")
                print(
                    "   {} steps: training {:.2f}, validation {:.2f}, test {:.3f}".format(*module.history[-1]), end=""
                )
                print(f"   {time.perf_counter() - began:.0f} s", flush=True)
    memory = measure_memory(splits[args.seeds[0]], args.seeds[0])
    results = {"models": models, "terms": list(TERMS), "memory": memory}
    known = args.dataset == "mnist5k" and args.solver == "identity"
    return conclude(NAME, results, args, summary=summary, table=table, draw=draw, comparable=known)


if __name__ == "__main__":
    main()
