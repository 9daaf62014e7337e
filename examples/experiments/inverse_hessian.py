"""The inverse Hessian of logistic regression on MNIST and every approximation of it, as pictures.

At the minimum of the training loss, cross-entropy with a little weight decay, the inverse Hessian is compared with what
each method of the package makes of it (Lorraine, Vicol, Duvenaud 2019, Fig. 2). Yellow entries are large and
dark ones small, in one logarithmic scale for all panels. There is a block of pixels by pixels for each pair of digits.

The identity contains none of the blocks; each Neumann term adds more of them. Gauss–Newton is exact, because the model
is linear. KFAC misses only that the digits' predictions depend on each other differently in each image. The outer
product of the gradient, which the slides call Gauss–Newton, is zero at the minimum, where only the damping is left to
invert. Unrolled gradient descent inverts as the Neumann series does: the two are compared by numbers.

Images are pooled to 7 × 7 pixels, which leaves 500 weights; `--full` takes all 28 × 28, and a matrix of 7,850 × 7,850.

    python -m examples.experiments.inverse_hessian           # twenty seconds on two cores
    python -m examples.experiments.inverse_hessian --full    # a quarter of an hour, and 8 GB of memory
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

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
from examples.experiments.style import page
from lightning_ifthpo import unrolled_hypergradient
from lightning_ifthpo.curvature import (
    GaussNewtonOperator,
    GradientOuterProductOperator,
    HessianOperator,
    KFACOperator,
    MatrixOperator,
    mark_outputs,
)
from lightning_ifthpo.solvers import ConjugateGradient, Identity, LinearSystem, Neumann, Nystrom, Solver

NAME = "inverse_hessian"
DECAY = 1e-3  # of all weights, in the loss; without it softmax has a null space: shifting all logits changes nothing
TERMS = (1, 5, 20, 100)
ITERATIONS = (5, 20)  # of conjugate gradients
RANK = 100
PIXELS = 80  # on each side of a panel, at most
COLUMNS = 4  # of panels


class Problem:
    """Logistic regression on 5,000 images.

    Args:
        pooling: Pixels on each side of a square that becomes one.
    """

    def __init__(self, pooling: int) -> None:
        torch.manual_seed(0)
        pixels, digits = mnist_5k()
        images = F.avg_pool2d(pixels.double() / 255, pooling).flatten(1)
        self.data = images, digits
        self.net = nn.Linear(images.shape[1], 10).double()
        self.parameters = list(self.net.parameters())

    def loss(self) -> Tensor:
        """Returns cross-entropy; its damped Hessian is the Hessian of the training loss."""
        images, digits = self.data
        return F.cross_entropy(mark_outputs(self.net(images)), digits)

    def penalized(self, decay: Tensor) -> Tensor:
        """Returns the training loss."""
        return self.loss() + decay / 2 * torch.stack([weight.square().sum() for weight in self.parameters]).sum()

    def train(self) -> float:
        """Goes to the minimum; returns the norm of the gradient there."""
        optimizer = torch.optim.LBFGS(
            self.parameters, max_iter=1000, tolerance_grad=1e-10, tolerance_change=0.0, line_search_fn="strong_wolfe"
        )

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = self.penalized(torch.tensor(DECAY))
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        optimizer.step(closure)  # type: ignore[no-untyped-call]
        gradients = torch.autograd.grad(self.penalized(torch.tensor(DECAY)), self.parameters)
        return float(torch.cat([gradient.flatten() for gradient in gradients]).norm())


class Spectrum(NamedTuple):
    """Eigenvalues [n], ascending, and eigenvectors [n, n] of the Hessian of the cross-entropy."""

    values: Tensor
    vectors: Tensor

    def inverse_by(self, solver: Solver) -> Tensor:
        """Returns the matrix [n, n] by which a series multiplies every b.

        It is a polynomial p(H) that does not depend on b. In the eigenbasis it is diagonal, so that a single solve for
        a vector of ones shows p at all eigenvalues.
        """
        shown = solver.solve(MatrixOperator(torch.diag(self.values)), torch.ones_like(self.values)).x
        return (self.vectors * shown) @ self.vectors.T


def inverse_by_columns(solver: Solver, matrix: Tensor) -> Tensor:
    """Returns the solutions for the columns of the identity, [n, n]."""
    operator = MatrixOperator(matrix)
    return torch.stack([solver.solve(operator, column).x for column in torch.eye(len(matrix)).to(matrix)], dim=1)


def approximations(problem: Problem, hessian: Tensor, spectrum: Spectrum, full: bool) -> Iterator[tuple[str, Tensor]]:
    """Yields each method's approximation of the inverse, [n, n], one at a time: with --full each takes half a GB."""
    loss, parameters = problem.loss, problem.parameters
    columns = torch.eye(len(hessian)).to(hessian)
    rate = 1.0 / (float(spectrum.values[-1]) + DECAY)  # the longest at which no term of the series changes its sign
    yield "identity", spectrum.inverse_by(Identity(rate))
    for terms in TERMS:
        yield f"Neumann {terms}", spectrum.inverse_by(Neumann(terms, step_size=rate, damping=DECAY))
    if not full:  # where it would take hours: 25 products for each of 7,850 columns
        for iterations in ITERATIONS:
            yield f"CG {iterations}", inverse_by_columns(ConjugateGradient(iterations, damping=DECAY), hessian)
    nystrom = Nystrom(RANK).approximation(LinearSystem(MatrixOperator(hessian), DECAY))
    yield f"Nyström {RANK}", torch.vmap(nystrom.solve)(columns)
    kfac = KFACOperator(loss, parameters)
    yield "KFAC", kfac.solve(columns, DECAY)
    outer = GradientOuterProductOperator(lambda: problem.penalized(torch.tensor(DECAY)), parameters)
    yield "gradient outer product", torch.vmap(partial(outer.solve, delta=DECAY))(columns)
    yield "Gauss–Newton", torch.linalg.inv(GaussNewtonOperator(loss, parameters).to_dense() + DECAY * columns)


def unrolled_difference(problem: Problem, spectrum: Spectrum) -> float:
    """Returns how far 21 unrolled steps of gradient descent are from 20 Neumann terms, applied to a random vector."""
    rate = 1.0 / (float(spectrum.values[-1]) + DECAY)
    b = torch.randn(len(spectrum.values), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    decay = torch.tensor(DECAY, dtype=torch.float64)

    def outer() -> Tensor:  # its gradient is b, wherever the weights are
        return b @ torch.cat([weight.flatten() for weight in problem.parameters])

    losses = (lambda: problem.penalized(decay), outer, problem.parameters, [decay])
    unrolled = unrolled_hypergradient(*losses, steps=21, lr=rate).solution.x
    neumann = spectrum.inverse_by(Neumann(20, step_size=rate, damping=DECAY)) @ b
    return float((unrolled - neumann).norm() / neumann.norm())


def small(matrix: Tensor) -> Tensor:
    """Returns the decimal logarithm of the mean magnitude in each of at most PIXELS × PIXELS fields."""
    side = min(PIXELS, len(matrix))
    return F.adaptive_avg_pool2d(matrix.abs()[None], side)[0].clamp_min(1e-12).log10()


def draw(pictures: dict[str, Tensor], results: Results) -> Figure:
    """Returns all matrices in one scale, that of the exact inverse, clipped at its percentiles."""
    low, high = pictures["exact inverse"].quantile(torch.tensor([0.02, 0.995], dtype=torch.float64)).tolist()
    methods = results["methods"]
    nearest = ", ".join(sorted(methods, key=lambda name: methods[name]["error"])[:3])
    height = 2.1 * math.ceil(len(pictures) / COLUMNS) + 0.6
    figure = page(height, f"The inverse Hessian and its approximations;\nthe nearest are {nearest}")
    panels = figure.subplots(math.ceil(len(pictures) / COLUMNS), COLUMNS).ravel()
    for panel in panels:
        panel.set_axis_off()
    for panel, (name, picture) in zip(panels, pictures.items(), strict=False):
        row = methods.get(name)
        caption = f"error {row['error']:.3f}, cosine {row['cosine']:.3f}" if row else "(the scale of all)"
        image = panel.imshow(picture.numpy(), cmap="viridis", vmin=low, vmax=high)
        panel.set_title(f"{name}\n{caption}", fontsize="medium")
    bar = figure.colorbar(image, ax=figure.axes, shrink=0.7, pad=0.01, aspect=30, extend="both")
    bar.set_label("log₁₀ of the magnitude of an entry")
    return figure


def summary(results: Results) -> dict[str, float]:
    """Returns the error and the cosine of each method."""
    rows = results["methods"].items()
    figures = {f"{name}, {key}": round(row[key], 3) for name, row in rows for key in ("error", "cosine")}
    return figures | {"unrolled against Neumann": results["unrolled against Neumann"]}


def table(results: Results) -> str:
    """Returns the error and the cosine of each method."""
    rows = [[name, number(row["error"]), number(row["cosine"])] for name, row in results["methods"].items()]
    return markdown(["", "relative error", "cosine"], rows)


def main(argv: list[str] | None = None) -> Figures:
    """Compares all methods with the exact inverse; returns what the last line says."""
    parser = make_parser(__doc__)
    parser.add_argument("--pooling", type=int, default=4, help="pixels on each side of a square that becomes one")
    parser.add_argument("--full", action="store_true", help="all 28 × 28 pixels")
    args = parser.parse_args(argv)
    start(threads=2)
    pooling = 1 if args.full else args.pooling
    problem = Problem(pooling)
    slope = problem.train()
    hessian = HessianOperator(problem.loss, problem.parameters).to_dense()
    spectrum = Spectrum(*torch.linalg.eigh(hessian))
    exact = spectrum.vectors / (spectrum.values + DECAY) @ spectrum.vectors.T
    print(
        f"{len(hessian):,} weights, gradient at the end {slope:.0e}, "
        f"largest eigenvalue {float(spectrum.values[-1]):.2f}, decay {DECAY:g}"
    )
    pictures, methods = {"exact inverse": small(exact)}, {}
    for name, inverse in approximations(problem, hessian, spectrum, args.full):
        error = float((inverse - exact).norm() / exact.norm())
        cosine = float((inverse * exact).sum() / (inverse.norm() * exact.norm()))
        pictures[name], methods[name] = small(inverse), {"error": round(error, 6), "cosine": round(cosine, 6)}
    results = {"methods": methods, "unrolled against Neumann": unrolled_difference(problem, spectrum)}
    return conclude(
        NAME,
        results,
        args,
        summary=summary,
        table=table,
        draw=partial(draw, pictures),
        comparable=pooling == 4,
    )


if __name__ == "__main__":
    main()
