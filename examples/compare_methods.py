"""Every inversion in the experiments themselves: what each is worth at the end, and what it costs.

A hypergradient that is nearer to the exact one need not end in a better network. Here the same training runs are made
with each way to invert the curvature, and nothing else changed: ten distilled images (`distill_dataset.py`), 3,000
images with 40 % wrong labels (`clean_noisy_labels.py`), and a decay for each of 203,530 weights, tuned to fit 50
validation images (`overfit_validation.py`), whose accuracy is shown. The settings of these examples (learning rates,
cadence, number of steps) were chosen with conjugate gradients, `Amortized` and, for the last, the identity, which the
others may hold against them.

Each run is added to a file of results as soon as it ends, and is not made again if it is there. The table, which the
README shows, is made from that file.

Run:
    python examples/compare_methods.py                 # ten minutes on two cores
    python examples/compare_methods.py --seeds 0 1 2   # the table of the README
    python examples/compare_methods.py --seeds 0 1 2 --output examples/results   # the same, from its file
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any, Literal, NamedTuple

import clean_noisy_labels as labels
import distill_dataset as distillation
import lightning as L
import overfit_validation as overfitting
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_ifthpo import IFTHypergradient
from lightning_ifthpo.curvature import Curvature
from lightning_ifthpo.hyperparameters import IndexedDataset
from lightning_ifthpo.solvers import Amortized, ConjugateGradient, Direct, Identity, Neumann, Nystrom, Solver


class Method(NamedTuple):
    """A way to invert the curvature."""

    solver: Solver
    curvature: Literal["auto"] | Curvature = "auto"  # Gauss–Newton, as all modules mark their outputs


RECORDED = Path(__file__).parent / "results" / "compare_methods.json"  # of seeds 0, 1 and 2
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
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        callbacks=[meter] if hypergradient is None else [hypergradient, meter],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(module, data)
    skipped = 0.0 if hypergradient is None else float(hypergradient.skipped)
    return {
        "seconds": round(meter.seconds, 2),
        "products": round(fmean(meter.products or [0.0]), 1),
        "skipped": skipped,
    }


def distilled_images(method: Method | None, seed: int, steps: int | None) -> Row:
    """Returns the test accuracy of a fresh regression on ten learned images, and the cost."""
    split = distillation.load_data("mnist5k", seed, Path(), download=False)
    initial, _ = distillation.class_means(split.outer, split.classes)
    steps = steps or distillation.STEPS
    torch.manual_seed(seed)
    module = distillation.Distiller(initial, steps // distillation.HYPER_EVERY)
    outer = DataLoader(TensorDataset(*split.outer), distillation.OUTER_BATCH)
    cost = fit(module, range(steps), callback(method, distillation.HYPER_EVERY, 0, outer))
    images, digits = module.distilled()
    net = distillation.train((images, digits), split.classes, distillation.DECAY, seed + 1000)
    return {"accuracy": distillation.accuracy(net, split.test)} | cost


def wrong_labels(method: Method | None, seed: int, steps: int | None) -> Row:
    """Returns the test accuracy of a fresh network that trusts labels as far as their learned weights, and the cost."""
    data = labels.load_data(seed)
    learn_steps, final_steps = (500, 800) if steps is None else (steps, steps)
    torch.manual_seed(seed)
    learner = labels.WeightLearner()
    outer = DataLoader(data.clean, batch_size=labels.CLEAN)
    cost = fit(
        learner,
        labels.loader(IndexedDataset(data.noisy), learn_steps, seed + 1),
        callback(method, labels.HYPER_EVERY, labels.WARM_UP, outer),
    )
    weights = learner.weights(torch.arange(labels.NOISY))
    dataset = labels.training_sets(data, {"learned": weights})["learned"]
    return {"accuracy": min(labels.train(dataset, data, seed, final_steps)).test_accuracy} | cost


def overfitted(method: Method | None, seed: int, steps: int | None) -> Row:
    """Returns the accuracy of a perceptron on the validation images that its decays are tuned on, and the cost."""
    model = overfitting.MODELS["mlp"]
    split = overfitting.load_data("mnist5k", seed, Path(), download=False)
    torch.manual_seed(seed)
    module = overfitting.Overfitter(model, split)
    data: Any = DataLoader([split.train] * (steps or model.steps), batch_size=None)  # type: ignore[arg-type]
    cost = fit(module, data, callback(method, 1, overfitting.START_AFTER, [split.validation]))
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


def table(results: dict[str, dict[str, dict[str, Row]]], seeds: list[int]) -> list[str]:
    """Returns the lines of a Markdown table: means over seeds, ± standard deviations."""
    names = list(results)
    header = [f"{name}: accuracy | products | time" for name in names]
    lines = ["| | " + " | ".join(header) + " |", "|---|" + "---|" * 3 * len(names)]
    for method in [UNTUNED, *METHODS]:
        cells = []
        for name in names:
            rows = [results[name][method][str(seed)] for seed in seeds]
            plain = [results[name][UNTUNED][str(seed)] for seed in seeds]
            accuracies = [row["accuracy"] for row in rows]
            ratio = fmean(row["seconds"] / other["seconds"] for row, other in zip(rows, plain, strict=True))
            spread = f" ± {pstdev(accuracies):.3f}" if len(seeds) > 1 else ""
            skipped = "†" if any(row["skipped"] for row in rows) else ""
            cells += [
                f"{fmean(accuracies):.3f}{spread}{skipped}",
                f"{fmean(row['products'] for row in rows):.0f}",
                f"{ratio:.1f}",
            ]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return lines


def main(argv: list[str] | None = None) -> dict[str, dict[str, float]]:
    """Makes the runs that are missing, and returns mean accuracies beside the recorded ones."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--experiments", nargs="+", choices=list(EXPERIMENTS), default=list(EXPERIMENTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, help="of each training run, instead of those of the examples")
    parser.add_argument("--output", type=Path, default=Path("results"), help="folder of the file to add to")
    args = parser.parse_args(argv)
    distillation.silence_lightning()
    torch.set_num_threads(1)  # at this size a second brings little
    args.output.mkdir(parents=True, exist_ok=True)
    shortened = "" if args.steps is None else f"_{args.steps}_steps"  # which must not be taken for whole runs
    file = args.output / f"compare_methods{shortened}.json"
    results = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    for name in args.experiments:
        for seed in args.seeds:
            for method in [UNTUNED, *METHODS]:
                runs = results.setdefault(name, {}).setdefault(method, {})
                if str(seed) in runs:
                    continue
                runs[str(seed)] = row = EXPERIMENTS[name](METHODS.get(method), seed, args.steps)
                file.write_text(json.dumps(results, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
                print(f"{name}, seed {seed}, {method}: {row}", flush=True)
    chosen = {name: results[name] for name in args.experiments}
    print("", *table(chosen, args.seeds), "", sep="\n")
    print(f"See {file}. † some hyper steps were skipped. Time is that of training, over that of the first row.")
    recorded = json.loads(RECORDED.read_text(encoding="utf-8"))
    summary = {
        f"{name}, {method}": {
            "measured": round(fmean(runs[str(seed)]["accuracy"] for seed in args.seeds), 4),
            "expected": round(fmean(row["accuracy"] for row in recorded[name][method].values()), 4),
        }
        for name, methods in chosen.items()
        for method, runs in methods.items()
    }
    print(json.dumps(summary, ensure_ascii=False))
    return summary


if __name__ == "__main__":
    main()
