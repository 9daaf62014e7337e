"""Which cheap estimate of the hypergradient foresees what training will do?

In minibatch training the weights are at no optimum and every hyper step sees another batch, so that the accuracy of one
linear solve says little. A hypergradient is to tell how the outer loss changes if the hyperparameters change now and
training goes on. That can be computed, at great cost, by differentiating the outer loss on all outer data through the
next 200 real optimizer steps on fresh batches. Such truths are taken along training runs on scikit-learn's digits, and
compared with estimators that see one training batch and one outer batch every five steps.

    A   softmax, one decay per weight                     B   MLP 64-64 (tanh), one decay per weight
    C   MLP 64-64 (ReLU), 40 % wrong labels, one weight per training example
    S   C with learning rates at which training is barely stable: a test of stability, not of cosines

The truth is the mean of several unrolls over different batches. "Two unrolls" is the cosine between two of them;
"perfect" that of their true mean with the mean of those taken, the best that an estimator can be expected to reach.
With AdamW everything is differentiated, its second moments included; its own decoupled decay is zero. Weights per
example are compared on all examples: a solve sees one batch, but the mixed derivative after it the whole training set.

    python -m examples.experiments.compare_estimators           # a minute on two cores
    python -m examples.experiments.compare_estimators --full    # the table, ten minutes
"""

from __future__ import annotations

import math
from collections import defaultdict
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from examples.experiments.common import (
    Figures,
    Results,
    conclude,
    digits_8x8,
    make_parser,
    markdown,
    number,
    start,
)
from examples.experiments.watching import watched
from lightning_ifthpo import implicit_hypergradient
from lightning_ifthpo.curvature import Curvature
from lightning_ifthpo.optimizers.update_rule import UpdateRule
from lightning_ifthpo.solvers import Amortized, ConjugateGradient, Identity, Neumann, Solver

NAME = "compare_estimators"
TRAINING, OUTER, BATCH_SIZE = 1000, 300, 128  # examples
EVERY_N_BATCHES = 5
WARM_UP = 400  # training steps from the first hyper step to the first comparison, for persistent estimates to settle
GAP = 200  # training steps between comparisons
DEFAULT, COLD = "**`Amortized(products=2)`**", "CG 20, cold, damped"
OPTIMIZERS = ("sgd", "momentum", "adamw")
TITLES = {"sgd": "SGD", "momentum": "momentum", "adamw": "AdamW"}


class Setting(NamedTuple):
    """An inner problem; one learning rate for each optimizer."""

    hidden: tuple[int, ...]
    wrong_labels: float
    start: int  # training step of the first hyper step
    rates: tuple[float, float, float]


SETTINGS = {
    "A": Setting((), 0.0, 3000, (0.5, 0.1, 3e-3)),
    "B": Setting((64, 64), 0.0, 500, (0.1, 0.03, 1e-3)),
    "C": Setting((64, 64), 0.4, 100, (0.1, 0.03, 1e-3)),
    "S": Setting((64, 64), 0.4, 100, (0.5, 0.1, 5e-3)),
}


class Problem:
    """Data, losses, the weights and the hyperparameters as one vector each."""

    def __init__(self, setting: Setting, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self._decays = setting.wrong_labels == 0.0
        self._layers = list(zip((64, *setting.hidden), (*setting.hidden, 10), strict=True))
        pixels, digits = digits_8x8()
        order = torch.randperm(len(digits), generator=self.generator)[: TRAINING + OUTER]
        x, y = pixels[order].double(), digits[order]
        self._outer_x, self._outer_y, self._x, y = x[TRAINING:], y[TRAINING:], x[:TRAINING], y[:TRAINING]
        wrong = torch.rand(TRAINING, generator=self.generator) < setting.wrong_labels
        self._y = torch.where(wrong, (y + torch.randint(1, 10, (TRAINING,), generator=self.generator)) % 10, y)
        initial = [
            x.new_empty((i + 1) * o).uniform_(-(i**-0.5), i**-0.5, generator=self.generator) for i, o in self._layers
        ]
        self.hyperparameter = torch.cat(initial).fill_(math.log(1e-3)) if self._decays else x.new_zeros(TRAINING)
        self.weights = torch.cat(initial).requires_grad_()

    def inner(self, weights: Tensor, hyperparameter: Tensor, index: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Returns the training loss and the logits."""
        logits = self._logits(weights, self._x[index])
        losses = F.cross_entropy(logits, self._y[index], reduction="none")
        if self._decays:
            return losses.mean() + (hyperparameter.exp() * weights.square()).sum() / 2, logits
        return (2 * torch.sigmoid(hyperparameter[index]) * losses).mean(), logits

    def outer(self, weights: Tensor, index: Tensor | slice) -> Tensor:
        """Returns the outer loss on some outer examples."""
        return F.cross_entropy(self._logits(weights, self._outer_x[index]), self._outer_y[index])

    def hypergradient(self, q: Tensor) -> Tensor:
        """Returns −(∂²L_T/∂w∂λᵀ)ᵀ q with all training examples."""
        hyperparameter = self.hyperparameter.detach().requires_grad_()
        loss, _ = self.inner(self.weights, hyperparameter, slice(None))
        (gradient,) = torch.autograd.grad(loss, self.weights, create_graph=True)
        return -torch.autograd.grad(gradient, hyperparameter, q)[0]

    def _logits(self, weights: Tensor, x: Tensor) -> Tensor:
        tensors = torch.split(weights, [(i + 1) * o for i, o in self._layers])
        for depth, (tensor, (i, o)) in enumerate(zip(tensors, self._layers, strict=True)):
            if depth:
                x = torch.tanh(x) if self._decays else torch.relu(x)
            matrix = tensor.view(i + 1, o)
            x = torch.addmm(matrix[-1], x, matrix[:-1])
        return x


def unrolled(problem: Problem, optimizer: torch.optim.Optimizer, steps: int, seed: int) -> Tensor:
    """Returns d(outer loss after so many more steps of the optimizer) / dλ; the run itself is not touched."""
    group, state = optimizer.param_groups[0], optimizer.state[problem.weights]
    lr, momentum, adaptive = group["lr"], group.get("momentum", 0.0), "betas" in group
    generator = torch.Generator().manual_seed(seed)
    hyperparameter = problem.hyperparameter.detach().requires_grad_()
    w = problem.weights.detach().requires_grad_()
    m = state["exp_avg"] if adaptive else state.get("momentum_buffer", torch.zeros_like(w))
    s = state["exp_avg_sq"] if adaptive else torch.zeros_like(w)
    for t in range(1, steps + 1):
        batch = torch.randperm(TRAINING, generator=generator)[:BATCH_SIZE]
        loss, _ = problem.inner(w, hyperparameter, batch)
        (g,) = torch.autograd.grad(loss, w, create_graph=True)
        if adaptive:
            count = int(state["step"]) + t
            m, s = 0.9 * m + 0.1 * g, 0.999 * s + 0.001 * g.square()
            # 1e-20: a weight without gradient has s = 0, where the root cannot be differentiated
            root = (s / (1 - 0.999**count) + 1e-20).sqrt() + 1e-8
            w = w - lr * m / (1 - 0.9**count) / root
        else:
            m = momentum * m + g
            w = w - lr * m
    return torch.autograd.grad(problem.outer(w, slice(None)), hyperparameter)[0]


class Estimator(NamedTuple):
    """A solver and its curvature; a warm one works at every hyper step and starts from its last estimate."""

    solver: Solver
    curvature: Curvature = "gauss_newton"
    warm: bool = False


def make_estimators(lr: float) -> dict[str, Estimator]:
    """Returns what is compared, by name; Gauss–Newton unless the name says otherwise."""
    return {
        "`Identity(lr)`": Estimator(Identity(step_size=lr)),
        "`Neumann(20, lr)` on the Hessian": Estimator(Neumann(terms=20, step_size=lr), "hessian"),
        "`Neumann(20, lr)`": Estimator(Neumann(terms=20, step_size=lr)),
        "CG 20, cold, undamped Hessian": Estimator(ConjugateGradient(max_iterations=20), "hessian"),
        COLD: Estimator(ConjugateGradient(max_iterations=20, damping="horizon")),
        "CG 1, warm, damped": Estimator(ConjugateGradient(max_iterations=1, damping="horizon"), warm=True),
        "CG 2, warm, damped": Estimator(ConjugateGradient(max_iterations=2, damping="horizon"), warm=True),
        DEFAULT: Estimator(Amortized(products=2), warm=True),
        "`Amortized(products=5)`": Estimator(Amortized(products=5), warm=True),
    }


class Cell(NamedTuple):
    """One setting with one optimizer: [cosine, ratio of norms, products, failed] of each estimator at each point."""

    values: dict[str, list[list[float]]]
    agreements: list[float]  # cosines between pairs of unrolls


def measure(setting: Setting, name: str, seeds: int, points: int, unroll: int, unrolls: int) -> Cell:
    """Trains, lets the estimators follow, and compares them with unrolls at some points."""
    cell, lr = Cell(defaultdict(list), []), setting.rates[OPTIMIZERS.index(name)]
    for seed in range(seeds):
        problem, estimators = Problem(setting, seed), make_estimators(lr)
        weights = [problem.weights]
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(weights, lr=lr, weight_decay=0.0)
        if name != "adamw":
            optimizer = torch.optim.SGD(weights, lr=lr, momentum=0.9 if name == "momentum" else 0.0)
        estimates: dict[str, Tensor | None] = {}
        first, shuffled = setting.start + WARM_UP, partial(torch.randperm, generator=problem.generator)
        for step in watched(range(1, first + GAP * (points - 1) + 1), f"{name}, seed {seed}"):
            batch, outer_batch = shuffled(TRAINING)[:BATCH_SIZE], shuffled(OUTER)[:BATCH_SIZE]
            inner = partial(problem.inner, problem.weights, problem.hyperparameter, batch)
            (problem.weights.grad,) = torch.autograd.grad(inner()[0], problem.weights)
            optimizer.step()
            if step < setting.start or step % EVERY_N_BATCHES:
                continue
            outer = partial(problem.outer, problem.weights, outer_batch)
            due = step >= first and (step - first) % GAP == 0
            truths = [unrolled(problem, optimizer, unroll, 100 * step + i) for i in range(unrolls)] if due else []
            cell.agreements.extend(float(a @ b / a.norm() / b.norm()) for i, a in enumerate(truths) for b in truths[:i])
            rule = UpdateRule.of([optimizer], weights)
            for key, (solver, curvature, warm) in estimators.items():
                if not (due or warm):
                    continue
                solver, x0 = solver.with_optimizer(rule), estimates.get(key)
                arguments = (inner, outer, weights, [problem.hyperparameter])
                result = implicit_hypergradient(*arguments, curvature=curvature, solver=solver, x0=x0, diagnosed=False)
                solution, failed = result.solution, not result.status.succeeded
                if warm:
                    estimates[key] = None if failed else solution.x
                if due:
                    estimate, truth = problem.hypergradient(solution.x), torch.stack(truths).mean(0)
                    cosine, ratio = F.cosine_similarity(estimate, truth, dim=0), estimate.norm() / truth.norm()
                    cell.values[key].append([float(cosine), float(ratio), solution.products, failed])
    return cell


def summarized(cell: Cell, seeds: int, unrolls: int) -> Results:
    """Returns the means of a cell over its points, and what limits them."""
    points = {name: torch.tensor(values).mean(0).tolist() for name, values in cell.values.items()}
    agreement = torch.tensor(cell.agreements).mean().clamp_min(0)
    # from the cosine c between two noisy copies of a vector: that between the vector and the mean of k copies
    perfect = (unrolls * agreement / (1 + (unrolls - 1) * agreement)).sqrt()
    # points of one run share its weights and estimates: only seeds are independent
    by_seed = torch.tensor(cell.values[DEFAULT])[:, 0].view(seeds, -1).mean(1)
    error = float(by_seed.std(correction=0) / (seeds - 1) ** 0.5) if seeds > 1 else None
    rows = {
        name: {"cosine": cosine, "ratio": ratio, "products": products, "failed": failed}
        for name, (cosine, ratio, products, failed) in points.items()
    }
    return {"estimators": rows, "two unrolls": float(agreement), "perfect": float(perfect), "standard error": error}


def summary(results: Results) -> dict[str, float]:
    """Returns the cosines of two estimators."""
    cells = results["cells"]
    labels = {"amortized": DEFAULT, "cold": COLD}
    return {f"{label} {key}": cells[key]["estimators"][row]["cosine"] for key in cells for label, row in labels.items()}


def table(results: Results) -> str:
    """Returns cosine (ratio of norms); † where a callback would have skipped most solves."""
    cells = {key: cell for key, cell in results["cells"].items() if not key.startswith("S")} or results["cells"]
    rows = []
    for name in next(iter(cells.values()))["estimators"]:
        entries = [cell["estimators"][name] for cell in cells.values()]
        row = [f"{max(entry['products'] for entry in entries):.0f}", name]
        for entry in entries:
            failed = "†" if entry["failed"] > 0.5 else ""
            row.append(f"{number(entry['cosine'], 2)} ({size(entry['ratio'])}){failed}")
        rows.append(row)
    for note in ("two unrolls", "perfect", "standard error"):
        if all(cell[note] is not None for cell in cells.values()):
            rows.append(
                ["", note, *(number(cell[note], 3 if note == "standard error" else 2) for cell in cells.values())]
            )
    titles = [f"{setting} {TITLES[name]}" for setting, name in (key.split() for key in cells)]
    return markdown(["products", "estimator", *titles], rows)


def size(ratio: float | None) -> str:
    """Returns a ratio of norms with two digits; of small ones an earlier run has not kept the value."""
    if ratio is None or ratio < 0.01:
        return "<.01"
    return "diverges" if ratio > 1e3 else number(ratio, 2 if ratio < 1 else 1 if ratio < 10 else 0)


def main(argv: list[str] | None = None) -> Figures:
    """Measures all cells; returns what the last line says."""
    parser = make_parser(__doc__)
    parser.add_argument("--full", action="store_true", help="setting S too, four seeds, four unrolls at each point")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS)
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=OPTIMIZERS)
    parser.add_argument("--points", type=int, default=4, help="comparisons in each run")
    parser.add_argument("--unroll", type=int, default=200, help="training steps in each unroll")
    args = parser.parse_args(argv)
    if args.record and not args.full:
        parser.error("--record is for runs with --full")
    start(threads=2)
    seeds, unrolls = (4, 4) if args.full else (1, 2)
    cells: Results = {}
    for key in args.settings or ("ABCS" if args.full else "ABC"):
        for name in args.optimizers:
            cell = measure(SETTINGS[key], name, seeds, args.points, args.unroll, unrolls)
            cells[f"{key} {name}"] = summarized(cell, seeds, unrolls)
            print(f"{key} {name}: cosine of two unrolls {cells[f'{key} {name}']['two unrolls']:.2f}", flush=True)
    return conclude(NAME, {"cells": cells}, args, summary=summary, table=table)


if __name__ == "__main__":
    main()
