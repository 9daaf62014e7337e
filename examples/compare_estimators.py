"""Which cheap estimate of the hypergradient foresees what training will do?

In minibatch training the weights are at no optimum, and every hyper step sees another batch, so that the accuracy of a
linear solve says little. What a hypergradient is for is to tell how the outer loss will change if the hyperparameters
change now and training goes on. That can be computed, at great cost: by differentiating the outer loss, on all outer
data, through the next 200 real optimizer steps on fresh batches. Here such truths are taken along real training runs
(scikit-learn's digits), and each estimator, which sees one training batch and one outer batch every five steps, is
compared with them: mean cosine, and in brackets the ratio of norms.

    A   softmax, one decay per weight                     B   MLP 64-64 (tanh), one decay per weight
    C   MLP 64-64 (ReLU), 40 % wrong labels, one weight per training example
    S   C at learning rates where training itself is barely stable: a test of stability, not of cosines

The truth is the mean of several unrolls over different batches. Two such unrolls have the cosine "two unrolls" with each
other; "perfect" is what the exact mean over all unrolls would reach with the mean of the few that were taken. For AdamW
everything is differentiated, its second moments included; its own weight decay is zero.

Weights per example are compared on all examples: the estimate of H⁻¹v comes from single batches, the mixed derivative
behind it is taken on the whole training set, as many hyper steps would do.

    python examples/compare_estimators.py           # one minute on two cores
    python examples/compare_estimators.py --full    # all settings, two seeds
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional as F

from lightning_ifthpo import implicit_hypergradient
from lightning_ifthpo.hypergradient import Curvature
from lightning_ifthpo.loss_graph import LossGraph
from lightning_ifthpo.solvers import Amortized, ConjugateGradient, Identity, Neumann, Solver, Status
from lightning_ifthpo.update_rule import UpdateRule

OptimizerName: TypeAlias = Literal["sgd", "momentum", "adamw"]
OPTIMIZERS: tuple[OptimizerName, ...] = ("sgd", "momentum", "adamw")
BATCH_SIZE = 128
EVERY_N_BATCHES = 5
WARM_UP = 400  # training steps of hyper steps before the first comparison: the time a persistent estimate needs
GAP = 100  # training steps between two comparisons
DTYPE = torch.float64


@dataclass(frozen=True)
class Setting:
    """An inner problem; `start` is the training step at which hyper steps begin."""

    hidden: tuple[int, ...]
    wrong_labels: float
    start: int
    rates: tuple[float, float, float]


SETTINGS = {
    "A": Setting((), 0.0, 3000, (0.5, 0.1, 3e-3)),
    "B": Setting((64, 64), 0.0, 500, (0.1, 0.03, 1e-3)),
    "C": Setting((64, 64), 0.4, 100, (0.1, 0.03, 1e-3)),
    "S": Setting((64, 64), 0.4, 100, (0.5, 0.1, 5e-3)),
}


class Problem:
    """Data, losses and a flat weight vector [n]; the hyperparameter is a decay per weight or a weight per example."""

    def __init__(self, setting: Setting, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.decays = setting.wrong_labels == 0.0
        self._sizes = (64, *setting.hidden, 10)
        pixels, digits = load_digits(return_X_y=True)
        order = torch.randperm(len(digits), generator=self.generator)
        x, y = torch.tensor(pixels / 16.0, dtype=DTYPE)[order], torch.tensor(digits)[order]
        self.x, self.y, self._outer_x, self._outer_y = x[:1000], y[:1000], x[1000:1300], y[1000:1300]
        wrong = torch.rand(1000, generator=self.generator) < setting.wrong_labels
        self.y = torch.where(wrong, (self.y + torch.randint(1, 10, (1000,), generator=self.generator)) % 10, self.y)
        parts = []
        for inputs, outputs in zip(self._sizes, self._sizes[1:], strict=False):
            layer = 2 * torch.rand((inputs + 1) * outputs, generator=self.generator, dtype=DTYPE) - 1
            parts.append(layer / math.sqrt(inputs))
        self.weights = torch.cat(parts).requires_grad_()
        n = self.weights.numel()
        self.hyperparameter = torch.full((n,), math.log(1e-3), dtype=DTYPE) if self.decays else x.new_zeros(1000)

    def logits(self, weights: Tensor, x: Tensor) -> Tensor:
        begin = 0
        for inputs, outputs in zip(self._sizes, self._sizes[1:], strict=False):
            layer = weights[begin : begin + (inputs + 1) * outputs].view(inputs + 1, outputs)
            if begin:
                x = torch.tanh(x) if self.decays else torch.relu(x)
            x = torch.addmm(layer[-1], x, layer[:-1])
            begin += layer.numel()
        return x

    def inner(self, weights: Tensor, hyperparameter: Tensor, index: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Returns the training loss on some examples, and the logits."""
        logits = self.logits(weights, self.x[index])
        losses = F.cross_entropy(logits, self.y[index], reduction="none")
        if self.decays:
            return losses.mean() + (hyperparameter.exp() * weights.square()).sum() / 2, logits
        return (2 * torch.sigmoid(hyperparameter[index]) * losses).mean(), logits

    def outer(self, weights: Tensor, index: Tensor | slice = slice(None)) -> Tensor:
        """Returns the outer loss on some outer examples."""
        return F.cross_entropy(self.logits(weights, self._outer_x[index]), self._outer_y[index])

    def batch(self, generator: torch.Generator) -> Tensor:
        return torch.randperm(len(self.y), generator=generator)[:BATCH_SIZE]

    def outer_batch(self) -> Tensor:
        return torch.randperm(len(self._outer_y), generator=self.generator)[:BATCH_SIZE]

    def hypergradient(self, q: Tensor) -> Tensor:
        """Returns −(∂²L_T/∂w∂λᵀ)ᵀ q on all training examples, for q ≈ H⁻¹ ∂L_V/∂w."""
        hyperparameter = self.hyperparameter.detach().requires_grad_()
        graph = LossGraph(self.inner(self.weights, hyperparameter, slice(None))[0], [self.weights])
        (mixed,) = graph.mixed_product(q, [hyperparameter])
        assert mixed is not None
        return -mixed


def make_optimizer(name: OptimizerName, weights: Tensor, lr: float) -> torch.optim.Optimizer:
    if name == "adamw":
        return torch.optim.AdamW([weights], lr=lr, weight_decay=0.0)
    return torch.optim.SGD([weights], lr=lr, momentum=0.9 if name == "momentum" else 0.0)


def unrolled(
    problem: Problem, optimizer: torch.optim.Optimizer, name: OptimizerName, steps: int, generator: torch.Generator
) -> Tensor:
    """Returns d(outer loss after `steps` more optimizer steps) / dλ; the run itself is not touched."""
    state, lr = optimizer.state[problem.weights], float(optimizer.param_groups[0]["lr"])
    hyperparameter = problem.hyperparameter.clone().requires_grad_()
    w = problem.weights.detach().clone().requires_grad_()
    velocity, second = (state.get(key, torch.zeros_like(w)) for key in ("momentum_buffer", "exp_avg_sq"))
    first, count = state.get("exp_avg", velocity), int(state.get("step", 0))
    for t in range(count + 1, count + steps + 1):
        loss, _ = problem.inner(w, hyperparameter, problem.batch(generator))
        (g,) = torch.autograd.grad(loss, w, create_graph=True)
        if name == "adamw":
            first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g.square()
            # 1e-20: the root has no derivative at zero, where a dead unit's second moment lies
            root = (second / (1 - 0.999**t) + 1e-20).sqrt()
            w = w - lr * (first / (1 - 0.9**t)) / (root + 1e-8)
        else:
            first = g + (0.9 * first if name == "momentum" else 0.0)
            w = w - lr * first
    return torch.autograd.grad(problem.outer(w), hyperparameter)[0]


@dataclass(frozen=True)
class Estimator:
    """A solver with its curvature; a warm one is asked at every hyper step and starts from its last answer."""

    name: str
    solver: Solver
    curvature: Curvature = "gauss_newton"
    warm: bool = False


def make_estimators(lr: float) -> list[Estimator]:
    return [
        Estimator("`Identity`", Identity(scale=lr)),
        Estimator("`Neumann(20, lr)`, Hessian", Neumann(terms=20, step_size=lr), "hessian"),
        Estimator("`Neumann(20, lr)`", Neumann(terms=20, step_size=lr)),
        Estimator("CG 20, cold, undamped Hessian", ConjugateGradient(max_iterations=20), "hessian"),
        Estimator("CG 20, cold, damped", ConjugateGradient(max_iterations=20, damping="horizon")),
        Estimator("CG 1, warm, damped", ConjugateGradient(max_iterations=1, damping="horizon"), warm=True),
        Estimator("CG 2, warm, damped", ConjugateGradient(max_iterations=2, damping="horizon"), warm=True),
        Estimator("`Amortized(products=1)`", Amortized(products=1), warm=True),
        Estimator("**`Amortized(products=2)`**", Amortized(products=2), warm=True),
        Estimator("`Amortized(products=5)`", Amortized(products=5), warm=True),
    ]


@dataclass(frozen=True)
class Comparison:
    """One estimate beside one truth."""

    cosine: float
    ratio: float
    products: int
    status: Status


@dataclass
class Cell:
    """All comparisons in one setting with one optimizer."""

    comparisons: dict[str, list[Comparison]]
    agreement: list[float]  # cosines between pairs of unrolls
    unrolls: int

    def mean(self, name: str) -> float:
        return _mean([c.cosine for c in self.comparisons[name]])

    def spread(self, name: str) -> float:
        """Standard error of the mean cosine."""
        cosines = torch.tensor([c.cosine for c in self.comparisons[name]])
        return float(cosines.std() / math.sqrt(len(cosines))) if len(cosines) > 1 else math.nan

    @property
    def perfect(self) -> float:
        c = max(_mean(self.agreement), 0.0)
        return math.sqrt(self.unrolls * c / (1 + (self.unrolls - 1) * c))

    def entry(self, name: str) -> str:
        comparisons = self.comparisons[name]
        ratio = _mean([c.ratio for c in comparisons])
        failed = sum(not c.status.trustworthy for c in comparisons) > len(comparisons) / 2
        size = "diverges" if ratio > 1e3 else f"{ratio:.2g}"
        return f"{self.mean(name):.2f} ({size})" + ("†" if failed else "")


def measure(setting: Setting, name: OptimizerName, seeds: int, points: int, steps: int, unrolls: int) -> Cell:
    """Trains, asks all estimators on the way, and compares them with unrolls at some points."""
    comparisons: dict[str, list[Comparison]] = defaultdict(list)
    agreement: list[float] = []
    lr = setting.rates[OPTIMIZERS.index(name)]
    for seed in range(seeds):
        problem, estimates = Problem(setting, seed), dict[str, Tensor | None]()
        optimizer, estimators = make_optimizer(name, problem.weights, lr), make_estimators(lr)
        first = setting.start + WARM_UP
        for step in range(1, first + GAP * (points - 1) + 1):
            batch = problem.batch(problem.generator)
            optimizer.zero_grad()
            problem.inner(problem.weights, problem.hyperparameter, batch)[0].backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            if step < setting.start or step % EVERY_N_BATCHES:
                continue
            due = step >= first and (step - first) % GAP == 0
            outer_batch = problem.outer_batch()
            truths = []
            if due:
                truths = [
                    unrolled(problem, optimizer, name, steps, torch.Generator().manual_seed(1000 * step + i))
                    for i in range(unrolls)
                ]
                agreement += [_cosine(a, b) for i, a in enumerate(truths) for b in truths[:i]]
            for estimator in estimators:
                if not (due or estimator.warm):
                    continue
                solution = implicit_hypergradient(
                    lambda batch=batch: problem.inner(problem.weights, problem.hyperparameter, batch),
                    lambda outer_batch=outer_batch: problem.outer(problem.weights, outer_batch),
                    [problem.weights],
                    [problem.hyperparameter],
                    curvature=estimator.curvature,
                    solver=estimator.solver.bound_to(UpdateRule.of([optimizer], [problem.weights])),
                    x0=estimates.get(estimator.name),
                    diagnosed=False,
                ).solution
                if estimator.warm:
                    estimates[estimator.name] = solution.x if solution.status.trustworthy else None
                if due:
                    estimate, truth = problem.hypergradient(solution.x), torch.stack(truths).mean(0)
                    ratio = float(estimate.norm() / truth.norm())
                    cosine = _cosine(estimate, truth)
                    comparisons[estimator.name].append(Comparison(cosine, ratio, solution.products, solution.status))
    return Cell(comparisons, agreement, unrolls)


def table(cells: dict[str, Cell]) -> str:
    """Returns the Markdown table of all cells."""
    names = list(next(iter(cells.values())).comparisons)
    rows = [["estimator", "products", *cells], ["---"] * (len(cells) + 2)]
    for name in names:
        products = max(c.products for cell in cells.values() for c in cell.comparisons[name])
        rows.append([name, str(products), *(cell.entry(name) for cell in cells.values())])
    rows.append(["two unrolls", "", *(f"{_mean(cell.agreement):.2f}" for cell in cells.values())])
    rows.append(["perfect", "", *(f"{cell.perfect:.2f}" for cell in cells.values())])
    noise = (max(cell.spread(name) for name in names) for cell in cells.values())
    rows.append(["± (largest standard error of a cosine)", "", *(f"{value:.2f}" for value in noise)])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description="Compares estimates of the hypergradient with long unrolls.")
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--settings", default=None)
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS))
    parser.add_argument("--points", type=int, default=None)
    parser.add_argument("--unroll", type=int, default=200)
    parser.add_argument("--unrolls", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=None)
    options = parser.parse_args(argv)
    torch.set_num_threads(2)
    cells: dict[str, Cell] = {}
    for key in options.settings or "ABCS":
        for name in options.optimizers:
            t = time.time()
            cells[f"{key} {name}"] = measure(
                SETTINGS[key], name, options.seeds or 1, options.points or 2, options.unroll, options.unrolls
            )
            print(key, name, time.time() - t, flush=True)
    print(table(cells))
    return {}


def _cosine(a: Tensor, b: Tensor) -> float:
    return float(F.cosine_similarity(a, b, dim=0))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


if __name__ == "__main__":
    main()
