"""Every way to invert the curvature, in the experiments themselves: what each is worth at the end, and what it costs.

A hypergradient that is nearer to the exact one need not end in a better network. Here the same training runs are made
with each way to invert the curvature, and nothing else changed: ten distilled images (`distill_dataset`), 3,000 images
with 40 % wrong labels (`clean_noisy_labels`), and a decay for each of 203,530 weights, tuned to fit 50 validation
images (`overfit_validation`), whose accuracy is shown. The settings (learning rates, cadence, number of
steps) were chosen with conjugate gradients, `Amortized` and, for the last, the identity. That favours these three.

With `--record` each run is added to the result file as soon as it ends, and is not made again if it is there.

    python -m examples.experiments.compare_methods                          # ten minutes on two cores
    python -m examples.experiments.compare_methods --seeds 0 1 2 --record   # the table of the documentation
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from statistics import fmean
from typing import Any, Literal, NamedTuple

import lightning as L
import torch
from torch.utils.data import DataLoader, TensorDataset

from examples.experiments.common import (
    RECORDED,
    Figures,
    Results,
    accuracy,
    conclude,
    full_batches,
    make_parser,
    markdown,
    mean,
    quiet_trainer,
    read,
    spread,
    start,
    values,
    write,
)
from examples.experiments.problems import distillation, label_noise, noisy_labels, overfitting
from lightning_ifthpo import IFTHypergradient
from lightning_ifthpo.curvature import Curvature
from lightning_ifthpo.hyperparameters import IndexedDataset
from lightning_ifthpo.solvers import Amortized, ConjugateGradient, Direct, Identity, Neumann, Nystrom, Solver

NAME = "compare_methods"


class Method(NamedTuple):
    """A way to invert the curvature."""

    solver: Solver
    curvature: Literal["auto"] | Curvature = "auto"  # Gauss–Newton, as all modules mark their outputs


UNTUNED = "untuned"
METHODS: dict[str, Method] = {
    "identity (T1–T2)": Method(Identity()),
    "gradient outer product": Method(Direct(damping="horizon"), "gradient_outer_product"),
    "Neumann, 2 terms": Method(Neumann(2)),
    "Neumann, 20 terms": Method(Neumann(20)),
    "CG, 10 iterations": Method(ConjugateGradient(10, damping="horizon")),
    "Nyström, rank 20": Method(Nystrom(20, damping="horizon")),
    "KFAC": Method(Direct(damping="horizon"), "kfac"),
    "`Amortized(products=2)`": Method(Amortized(products=2)),
}
Row = dict[str, float]


class Meter(L.Callback):
    """Takes the time of training alone, and counts products."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.products: list[float] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts the clock."""
        self._began = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Notes the products of the last hyper step."""
        if "hypergrad/products" in trainer.callback_metrics:
            self.products.append(float(trainer.callback_metrics["hypergrad/products"]))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stops the clock."""
        self.seconds = time.perf_counter() - self._began


def fit(module: L.LightningModule, data: Iterable[Any], hypergradient: IFTHypergradient | None) -> Row:
    """Trains a module, and returns what that has cost."""
    meter = Meter()
    quiet_trainer([meter] if hypergradient is None else [hypergradient, meter]).fit(module, data)
    skipped = 0.0 if hypergradient is None else float(hypergradient.skipped)
    products = round(fmean(meter.products or [0.0]), 1)
    return {"seconds": round(meter.seconds, 2), "products": products, "skipped": skipped}


def distilled_images(method: Method | None, seed: int, steps: int | None) -> Row:
    """Returns the test accuracy of a fresh regression on ten learned images, and the cost."""
    split = distillation.load_data("mnist5k", seed)
    initial, _ = distillation.class_means(split.outer, split.classes)
    steps = steps or distillation.STEPS
    torch.manual_seed(seed)
    module = distillation.Distiller(initial, steps // distillation.HYPER_EVERY)
    outer = DataLoader(TensorDataset(*split.outer), distillation.OUTER_BATCH)
    cost = fit(module, range(steps), callback(method, distillation.HYPER_EVERY, 0, outer))
    images, digits = module.distilled()
    net = distillation.train((images, digits), split.classes, distillation.DECAY, seed + 1000)
    return {"accuracy": accuracy(net, split.test)} | cost


def wrong_labels(method: Method | None, seed: int, steps: int | None) -> Row:
    """Returns the test accuracy of a fresh network that trusts labels as far as their learned weights, and the cost."""
    data = noisy_labels.load_data(seed)
    torch.manual_seed(seed)
    learner = label_noise.Learner(data)
    outer = DataLoader(TensorDataset(*data.checked), batch_size=label_noise.CHECKED)
    training = IndexedDataset(TensorDataset(*data.noisy))
    batches = noisy_labels.batches(training, steps or label_noise.LEARN_STEPS, seed + 1)
    cost = fit(learner, batches, callback(method, label_noise.HYPER_EVERY, label_noise.WARM_UP, outer))
    checks = noisy_labels.train(data, learner.weights.natural_values(), seed, steps or noisy_labels.FINAL_STEPS)
    return {"accuracy": min(checks).test_accuracy} | cost


def overfitted(method: Method | None, seed: int, steps: int | None) -> Row:
    """Returns the accuracy of a perceptron on the validation images that its decays are tuned on, and the cost."""
    model, split = overfitting.MODELS["mlp"], overfitting.load_data("mnist5k", seed)
    torch.manual_seed(seed)
    module = overfitting.Overfitter(model, split)
    hypergradient = callback(method, 1, overfitting.START_AFTER, [split.validation])
    cost = fit(module, full_batches(split.train, steps or model.steps), hypergradient)
    return {"accuracy": module.history[-1].validation} | cost


EXPERIMENTS = {
    "ten distilled images": distilled_images,
    "40 % wrong labels": wrong_labels,
    "50 validation images fitted": overfitted,
}


def callback(method: Method | None, every: int, warm_up: int, outer: Iterable[Any]) -> IFTHypergradient | None:
    """Returns what tunes the hyperparameters, if anything does."""
    if method is None:
        return None
    return IFTHypergradient(
        every,
        solver=method.solver,
        curvature=method.curvature,
        start_after_batches=warm_up,
        outer_dataloader=outer,
    )


def of(runs: dict[str, Row], key: str) -> dict[str, float]:
    """Returns one value of each seed."""
    return {seed: row[key] for seed, row in runs.items()}


def summary(results: Results) -> dict[str, float]:
    """Returns mean accuracies."""
    runs = results["runs"]
    return {f"{name}, {method}": mean(of(runs[name][method], "accuracy")) for name in runs for method in runs[name]}


def table(results: Results) -> str:
    """Returns means over seeds, ± standard deviations; † where hyper steps were skipped."""
    runs = results["runs"]
    rows = []
    for method in [UNTUNED, *METHODS]:
        row = [method]
        for experiment in runs.values():
            mine, plain = experiment[method], experiment[UNTUNED]
            times = [mine[seed]["seconds"] / plain[seed]["seconds"] for seed in mine]
            skipped = "†" if any(values(of(mine, "skipped"))) else ""
            row += [
                spread(of(mine, "accuracy")) + skipped,
                f"{mean(of(mine, 'products')):.0f}",
                f"{fmean(times):.1f}",
            ]
        rows.append(row)
    titles = [title for name in runs for title in (f"{name}: accuracy", "products", "time")]
    return markdown(["", *titles], rows)


def main(argv: list[str] | None = None) -> Figures:
    """Makes the runs that are missing; returns what the last line says."""
    parser = make_parser(__doc__, seeds=[0])
    parser.add_argument("--experiments", nargs="+", choices=list(EXPERIMENTS), default=list(EXPERIMENTS))
    parser.add_argument("--steps", type=int, help="of each training run, instead of those of the experiments")
    args = parser.parse_args(argv)
    if args.record and args.steps is not None:
        parser.error("--record is for whole runs, without --steps")
    start()
    known = read(NAME).get("runs", {}) if args.record else {}
    runs: Results = {name: {method: {} for method in [UNTUNED, *METHODS]} for name in args.experiments}
    for name, methods in runs.items():
        for seed in args.seeds:
            for method, rows in methods.items():
                row = known.get(name, {}).get(method, {}).get(str(seed))
                if row is None:
                    row = EXPERIMENTS[name](METHODS.get(method), seed, args.steps)
                    print(f"{name}, seed {seed}, {method}: {row}", flush=True)
                rows[str(seed)] = row
                if args.record:
                    recorded = read(NAME)
                    recorded.setdefault("runs", {}).setdefault(name, {}).setdefault(method, {})[str(seed)] = row
                    write(NAME, recorded, RECORDED)
    return conclude(NAME, {"runs": runs}, args, summary=summary, table=table)


if __name__ == "__main__":
    main()
