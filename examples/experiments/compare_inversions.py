"""Every way to invert the curvature, compared with the exact hypergradient: by products and by time.

Logistic regression and a network with one hidden layer learn 500 images of MNIST-5k, pooled to 7 × 7 pixels, with one
decay for each weight; 1,000 other images are the outer data. At the optimum of the inner loss the exact hypergradient
comes from the dense Hessian. On the way there, where implicit differentiation is only an approximation, it is the
gradient of the outer loss through all of the training that is left.

The slides of Lorraine, Vicol and Duvenaud (2019, Fig. 5) report that KFAC does well on logistic regression, and that it
brought no improvement on deep networks; the code behind them orders the entries of its factors otherwise than those of
the vector that they multiply. A correct KFAC, of curvlinops, confirms the first, and improves on the identity with a
hidden layer too: as much as a hundred Neumann terms do, at the cost of a few gradients.

    python -m examples.experiments.compare_inversions           # three minutes on two cores
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor, nn
from torch.nn import functional as F

from examples.experiments.common import (
    Figures,
    Results,
    conclude,
    make_parser,
    markdown,
    mnist_5k,
    number,
    start,
)
from examples.experiments.style import OURS, PLAIN, WRONG, Role, name_rows, page
from lightning_ifthpo import Hypergradient, implicit_hypergradient, unrolled_hypergradient
from lightning_ifthpo.curvature import mark_outputs
from lightning_ifthpo.solvers import ConjugateGradient, Direct, Identity, Neumann, Nystrom

NAME = "compare_inversions"
TRAINING, OUTER, HIDDEN = 500, 1000, 16
DECAY = 1e-2  # of each weight: the smallest eigenvalue of Gauss–Newton, and a damping for methods that need one
MODELS: dict[str, Callable[[], nn.Module]] = {
    "logistic regression": lambda: nn.Linear(49, 10),
    "hidden layer": lambda: nn.Sequential(nn.Linear(49, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 10)),
}
PLACES = ("at the optimum", "after 50 steps")
HEADLINES = ("identity", "CG 20", "KFAC")
SHOWN = (  # in the table
    *("identity", "Neumann 20", "Neumann 100", "unroll 100", "CG 20", "CG 100", "CG 20, Gauss–Newton", "Nyström 20"),
    *("gradient outer product", "KFAC"),
)


class Problem:
    """A network, its data, and one decay for each weight."""

    def __init__(self, model: str) -> None:
        torch.manual_seed(0)
        pixels, labels = mnist_5k()
        order = torch.randperm(len(pixels))[: TRAINING + OUTER]
        images, targets = F.avg_pool2d(pixels[order].double() / 255, 4).flatten(1), labels[order]
        self.inner_data, self.outer_data = (
            (images[:TRAINING], targets[:TRAINING]),
            (images[TRAINING:], targets[TRAINING:]),
        )
        self.net = MODELS[model]().double()
        self.parameters = list(self.net.parameters())
        self.log_decays = [torch.full_like(weight, DECAY).log().detach() for weight in self.parameters]

    def inner(self) -> Tensor:
        """Returns cross-entropy and penalties."""
        images, targets = self.inner_data
        pairs = zip(self.log_decays, self.parameters, strict=True)
        penalties = [(log_decay.exp() * weight.square()).sum() for log_decay, weight in pairs]
        return F.cross_entropy(mark_outputs(self.net(images)), targets) + torch.stack(penalties).sum() / 2

    def outer(self) -> Tensor:
        """Returns the cross-entropy of the outer data."""
        images, targets = self.outer_data
        return F.cross_entropy(self.net(images), targets)

    def train(self, steps: int, lr: float = 0.5) -> None:
        """Makes steps of gradient descent."""
        for _ in range(steps):
            gradients = torch.autograd.grad(self.inner(), self.parameters)
            with torch.no_grad():
                for weight, gradient in zip(self.parameters, gradients, strict=True):
                    weight.sub_(gradient, alpha=lr)

    def finish(self) -> float:
        """Goes to the optimum; returns the largest entry of the gradient there."""
        optimizer = torch.optim.LBFGS(
            self.parameters, max_iter=5000, tolerance_grad=1e-9, tolerance_change=0.0, line_search_fn="strong_wolfe"
        )

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = self.inner()
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        optimizer.step(closure)  # type: ignore[no-untyped-call]
        return max(float(g.abs().max()) for g in torch.autograd.grad(self.inner(), self.parameters))

    def hypergradient(self, **options: Any) -> Hypergradient:
        """Returns the implicit one with some curvature and solver."""
        return implicit_hypergradient(
            self.inner, self.outer, self.parameters, self.log_decays, diagnosed=False, **options
        )

    def unrolled(self, steps: int, lr: float = 0.5) -> Hypergradient:
        """Returns that through so many steps of training."""
        losses = (self.inner, self.outer, self.parameters, self.log_decays)
        return unrolled_hypergradient(*losses, steps=steps, lr=lr)


def methods(problem: Problem) -> dict[str, Callable[[], Hypergradient]]:
    """Returns all by name."""
    solve = problem.hypergradient
    damped = {"curvature": "gauss_newton"}
    named: dict[str, Callable[[], Hypergradient]] = {
        "identity": partial(solve, solver=Identity(step_size=0.5)),
        "first order": partial(solve, solver=Identity(step_size=0.5), curvature="finite_difference"),
        **{f"Neumann {k}": partial(solve, solver=Neumann(k, step_size=0.5)) for k in (5, 20, 100)},
        **{f"unroll {k}": partial(problem.unrolled, k) for k in (5, 20, 100)},
        **{f"CG {k}": partial(solve, solver=ConjugateGradient(k)) for k in (5, 20, 100)},
        **{f"CG {k}, Gauss–Newton": partial(solve, solver=ConjugateGradient(k), **damped) for k in (5, 20)},
        **{
            f"Nyström {k}": partial(solve, solver=Nystrom(k, damping=DECAY), curvature="gauss_newton")
            for k in (20, 100)
        },
        "gradient outer product": partial(solve, solver=Direct(damping=DECAY), curvature="gradient_outer_product"),
        "KFAC": partial(solve, solver=Direct(damping=DECAY), curvature="kfac"),
    }
    return named


def compare(problem: Problem, exact: Hypergradient) -> Results:
    """Returns cosine, ratio of norms, products, seconds and failure of each method."""
    truth = torch.cat([part.flatten() for part in exact.gradients])
    results: Results = {}
    for name, method in methods(problem).items():
        began = time.perf_counter()
        result = method()
        seconds = time.perf_counter() - began
        got = torch.cat([part.flatten() for part in result.gradients])
        results[name] = {
            "cosine": float(F.cosine_similarity(got, truth, dim=0)),
            "ratio": float(got.norm() / truth.norm()),
            "products": result.products + ("unroll" in name),  # one for each unrolled step
            "seconds": round(seconds, 5),
            "failed": not result.status.succeeded,
            "stopped": name.startswith("Neumann") and result.products < int(name.split()[1]),
        }
    return results


def summary(results: Results) -> dict[str, float]:
    """Returns cosines of some methods."""
    return {
        f"{model}, {name}, {where}": results["models"][model][where][name]["cosine"]
        for model in results["models"]
        for name in HEADLINES
        for where in PLACES
    }


def table(results: Results) -> str:
    """Returns the cosine of each method; † where the solve failed, and ‡ where the series stopped early."""
    models = results["models"]
    places = [(model, where) for model in models for where in PLACES]
    rows = []
    for name in SHOWN:
        entries = [models[model][where][name] for model, where in places]
        products = [f"{entry['products']:.0f}" for entry in entries]
        marks = ["‡" if entry["stopped"] else "†" if entry["failed"] else "" for entry in entries]
        cosines = [number(entry["cosine"], 2) + mark for entry, mark in zip(entries, marks, strict=True)]
        rows.append([name, ", ".join(sorted(set(products), key=int)), *cosines])
    return markdown(["method", "products", *(f"{model}, {where}" for model, where in places)], rows)


def draw(results: Results) -> Figure:
    """Returns the cosine of each method's direction, one row for each method, in a panel for each problem."""
    models = results["models"]
    tables = {f"{model},\n{where}": models[model][where] for where in PLACES for model in models}
    names = list(dict.fromkeys(name for table in tables.values() for name in table))
    counts = [
        f"by {near_exact(places[PLACES[0]])} of {len(names)} methods ({model})" for model, places in models.items()
    ]
    headline = "At the optimum, a cosine of .9 with the exact hypergradient is reached\n" + ", ".join(counts)
    figure = page(0.25 * len(names) + 1.7, headline)
    panels = figure.subplots(1, len(tables), sharey=True, squeeze=False)[0]
    for panel, (title, table) in zip(panels, tables.items(), strict=True):
        name_rows(panel, names)
        for place, name in enumerate(names):
            cosine, role = table[name]["cosine"], role_of(table[name])
            panel.plot([0.0, cosine], [place, place], color=role.color, alpha=0.35)
            panel.plot(cosine, place, **role.points(markersize=7))
            panel.annotate(number(cosine, 2), (1.12, place), va="center", fontsize=8, color=role.color)
        panel.set(title=title, xlabel="cosine", xlim=(0.0, 1.45), xticks=[0.0, 0.5, 1.0])
    kinds = {"with products": OURS, "without products": PLAIN, "stopped early or failed, as its status says": WRONG}
    marks = [Line2D([], [], label=label, **role.points(markersize=7)) for label, role in kinds.items()]
    figure.legend(handles=marks, loc="outside lower center", ncols=3)
    return figure


def near_exact(table: Results) -> int:
    """Returns how many methods have a cosine of at least .9."""
    return sum(row["cosine"] >= 0.9 for row in table.values())


def role_of(row: Results) -> Role:
    """Returns how a method is drawn."""
    if row["failed"] or row["stopped"]:
        return WRONG
    return OURS if row["products"] else PLAIN


def main(argv: list[str] | None = None) -> Figures:
    """Runs both models at both points; returns what the last line says."""
    parser = make_parser(__doc__)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--unroll", type=int, default=500, help="training steps that are left, on the way")
    args = parser.parse_args(argv)
    start(threads=2)
    models: Results = {}
    for model in args.models:
        problem = Problem(model)
        problem.train(50)
        on_the_way = compare(problem, problem.unrolled(args.unroll))
        slope = problem.finish()
        at_optimum = compare(problem, problem.hypergradient(solver=Direct()))
        models[model] = {"after 50 steps": on_the_way, "at the optimum": at_optimum}
        print(f"{model}: largest entry of the gradient at the end {slope:.1e}", flush=True)
    return conclude(NAME, {"models": models}, args, summary=summary, table=table, draw=draw)


if __name__ == "__main__":
    main()
