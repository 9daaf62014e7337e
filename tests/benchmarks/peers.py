"""Measures accuracy and cost beside other libraries, on operators that do not change.

Run:
    pip install betty-ml torchopt hypergrad boat-torch higher pyhessian hessian-eigenthings curvlinops-for-pytorch scipy
    python -m tests.benchmarks.peers                     # two minutes of a free core
    python -m tests.benchmarks.peers --json peers.json   # and kept in a file

The libraries are not needed by anything else, and some of them ask for old versions of NumPy or torch: install them
with `--no-deps`. One that cannot be imported is left out.

Hypergradients are compared with a dense solve: digits, softmax regression with 650 weights, one log decay for each of
them, at the minimum, in float64. The largest eigenvalue is compared with that of the dense Hessian: a network with
2,410 weights, at its start and trained, in float32. Cost is in gradients of the same loss, and includes all that a
library does from the trained weights to the result. The libraries and this package take turns, round by round.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import warnings
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from examples.experiments.watching import watched
from lightning_ifthpo import implicit_hypergradient
from lightning_ifthpo.curvature import HessianOperator
from lightning_ifthpo.solvers import ConjugateGradient, Direct, Neumann, Nystrom
from lightning_ifthpo.spectrum import lanczos
from tests.benchmarks.cases import about, seconds_of

Method = Callable[[], Tensor]
ITERATIONS = (5, 20, 100)
PACKAGES = {
    "betty": "betty-ml",
    "torchopt": "torchopt",
    "hypergrad": "hypergrad",
    "boat_torch": "boat-torch",
    "pyhessian": "PyHessian",
    "hessian_eigenthings": "hessian-eigenthings",
    "curvlinops": "curvlinops-for-pytorch",
}


class Regression:
    """Softmax regression of digits, with one log decay for each weight.

    Attributes:
        weights: The matrix and the biases, at the minimum of the inner loss.
        decays: λ, shaped like the weights.
        condition: The condition number of the Hessian.
        exact: The hypergradient by a dense solve, [n].
    """

    def __init__(self) -> None:
        torch.manual_seed(0)
        pixels, labels = load_digits(return_X_y=True)
        self.x, self.y = torch.tensor(pixels) / 16, torch.tensor(labels)
        self.weights = [torch.zeros(shape, dtype=torch.float64, requires_grad=True) for shape in ((64, 10), (10,))]
        self.decays = [torch.full_like(weight, 2e-3).log().requires_grad_() for weight in self.weights]
        optimizer = torch.optim.LBFGS(
            self.weights, max_iter=2000, tolerance_grad=1e-13, tolerance_change=0.0, line_search_fn="strong_wolfe"
        )

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = self.inner()
            loss.backward()
            return loss

        optimizer.step(closure)  # type: ignore[arg-type]
        for tensor in [*self.weights, *self.decays]:
            tensor.grad = None
        hessian = HessianOperator(self.inner, self.weights).to_dense()
        ends = torch.linalg.eigvalsh(hessian)
        self.largest, self.condition = float(ends[-1]), float(ends[-1] / ends[0])
        q = torch.linalg.solve(hessian, flat(torch.autograd.grad(self.outer(), self.weights)))
        decay = flat(self.decays).exp()
        self.exact = -decay * flat(self.weights).detach() * q

    def inner(self, weights: Any = None, decays: Any = None) -> Tensor:
        """Returns L_T on a thousand digits."""
        matrix, bias = weights or self.weights
        penalties = [(d.exp() * w.square()).sum() for d, w in zip(decays or self.decays, (matrix, bias), strict=True)]
        return F.cross_entropy(self.x[:1000] @ matrix + bias, self.y[:1000]) + torch.stack(penalties).sum() / 2

    def outer(self, weights: Any = None, decays: Any = None) -> Tensor:
        """Returns L_V on the others."""
        matrix, bias = weights or self.weights
        return F.cross_entropy(self.x[1000:] @ matrix + bias, self.y[1000:])

    def unit(self) -> Any:
        """Returns the gradient of the inner loss: the unit of all costs."""
        return torch.autograd.grad(self.inner(), self.weights)

    def error(self, found: Tensor) -> float:
        """Returns the distance to the exact hypergradient over its length."""
        return float((found.detach() - self.exact).norm() / self.exact.norm())

    def methods(self) -> dict[str, Method]:
        """Returns each way to a hypergradient, [n]."""
        found: dict[str, Method] = {}
        for count in ITERATIONS:
            found[f"by hand, CG, {count}"] = partial(self.by_hand, count)
            gradients = ConjugateGradient(max_iterations=count)
            found[f"here, ConjugateGradient, {count}"] = partial(self.here, gradients)
            found[f"here, the same with diagnosed=False, {count}"] = partial(self.here, gradients, diagnosed=False)
            found[f"here, Neumann, {count}"] = partial(self.here, Neumann(terms=count))
            found[f"Betty, CG, {count}"] = partial(self.betty, count)
            found[f"BOAT, CG, {count}"] = partial(self.boat, count)
            found[f"hypergrad, CG, {count}"] = partial(self.hypergrad, count)
        sketched = ConjugateGradient(max_iterations=5, preconditioner=Nystrom(rank=60))
        found["here, ConjugateGradient, 5, after a sketch of rank 60"] = partial(self.here, sketched)
        found["here, Direct"] = partial(self.here, Direct())
        found["TorchOpt, its default"] = self.torchopt
        return found

    def here(self, solver: Any, *, diagnosed: bool = True) -> Tensor:
        """Returns what this package finds."""
        result = implicit_hypergradient(
            self.inner, self.outer, self.weights, self.decays, solver=solver, diagnosed=diagnosed
        )
        return flat(result.gradients)

    def by_hand(self, count: int) -> Tensor:
        """Returns what twenty lines find."""
        v = flat(torch.autograd.grad(self.outer(), self.weights))
        gradient = flat(torch.autograd.grad(self.inner(), self.weights, create_graph=True))
        x, r, p = torch.zeros_like(v), v, v
        squared = r @ r
        for _ in range(count):
            image = flat(torch.autograd.grad(gradient, self.weights, p, retain_graph=True))
            step = squared / (p @ image)
            x, r = x + step * p, r - step * image
            squared, last = r @ r, squared
            p = r + squared / last * p
        return -flat(torch.autograd.grad(gradient, self.decays, x))

    def betty(self, count: int) -> Tensor:
        """Returns what Betty's function finds, for problems with the attributes that it reads."""
        cg = importlib.import_module("betty.hypergradient.cg").cg
        config = SimpleNamespace(cg_iterations=count, cg_alpha=1.0)
        inner = SimpleNamespace(paths=[], config=config, cur_batch=None, training_step_exec=lambda _: self.inner())
        inner.parameters = inner.trainable_parameters = lambda: self.weights
        outer = SimpleNamespace(trainable_parameters=lambda: self.decays)
        return flat(cg(torch.autograd.grad(self.outer(), self.weights), inner, outer))

    def boat(self, count: int) -> Tensor:
        """Returns what BOAT's function finds, with a step of gradient descent as its fixed-point map."""
        utils = importlib.import_module("boat_torch.utils.op_utils")

        def step(weights: Any, loss: Tensor) -> list[Tensor]:
            gradients = torch.autograd.grad(loss, weights, create_graph=True)
            return [weight - gradient / self.largest for weight, gradient in zip(weights, gradients, strict=True)]

        return flat(
            utils.conjugate_gradient(self.weights, self.decays, self.outer(), self.inner(), count, step, tol=0.0)
        )

    def hypergrad(self, count: int) -> Tensor:
        """Returns what hypergrad's function finds."""
        function = importlib.import_module("hypergrad.approx_hypergrad").conjugate_gradient
        return flat(function(self.inner, self.outer, tuple(self.weights), tuple(self.decays), count, 1.0))

    def torchopt(self) -> Tensor:
        """Returns what TorchOpt's implicit differentiation finds around weights that are given."""
        library = importlib.import_module("torchopt")

        def stationary(weights: Any, decays: Any) -> Any:
            return torch.func.grad(self.inner)(weights, decays)

        @library.diff.implicit.custom_root(stationary, argnums=1)
        def solved(weights: Any, decays: Any) -> Any:
            return weights

        weights = tuple(weight.detach().clone().requires_grad_() for weight in self.weights)
        return flat(torch.autograd.grad(self.outer(solved(weights, tuple(self.decays))), self.decays))


class Network:
    """A network of two layers on digits.

    Attributes:
        exact: The largest eigenvalue of its Hessian, by a dense decomposition in float64.
    """

    def __init__(self, steps: int) -> None:
        torch.manual_seed(0)
        pixels, labels = load_digits(return_X_y=True)
        self.x, self.y = (torch.tensor(pixels) / 16).float(), torch.tensor(labels)
        self.net = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
        self.weights = list(self.net.parameters())
        optimizer = torch.optim.SGD(self.weights, lr=0.2, momentum=0.9)
        for _ in range(steps):
            optimizer.zero_grad()
            self.loss().backward()
            optimizer.step()
        optimizer.zero_grad()
        self.net.double()
        self.x = self.x.double()
        self.exact = float(torch.linalg.eigvalsh(HessianOperator(self.loss, self.weights).to_dense())[-1])
        self.net.float()
        self.x = self.x.float()

    def loss(self) -> Tensor:
        """Returns the loss on all digits."""
        return F.cross_entropy(self.net(self.x), self.y)

    def unit(self) -> Any:
        """Returns the gradient of the loss: the unit of all costs."""
        return torch.autograd.grad(self.loss(), self.weights)

    def error(self, found: Tensor) -> float:
        """Returns the distance to the exact eigenvalue over it."""
        return abs(float(found) - self.exact) / self.exact

    def methods(self) -> dict[str, Method]:
        """Returns each way to the largest eigenvalue, a scalar."""
        return {
            "here, lanczos, rtol=1e-2": partial(self.here, 1e-2),
            "here, lanczos, rtol=1e-4": partial(self.here, 1e-4),
            "PyHessian, its default": self.pyhessian,
            "curvlinops with scipy, tol=1e-3": self.curvlinops,
            "eigenthings, lanczos, 20 products": self.eigenthings,
        }

    def here(self, rtol: float) -> Tensor:
        """Returns what this package finds."""
        operator = HessianOperator(self.loss, self.weights)
        return lanczos(operator, max_iterations=50, rtol=rtol, generator=torch.Generator().manual_seed(0)).largest[0]

    def pyhessian(self) -> Tensor:
        """Returns what PyHessian finds."""
        library = importlib.import_module("pyhessian")
        values, _ = library.hessian(self.net, nn.CrossEntropyLoss(), data=(self.x, self.y), cuda=False).eigenvalues()
        self.net.zero_grad()
        return torch.tensor(values[0])

    def curvlinops(self) -> Tensor:
        """Returns what scipy's Lanczos method finds with curvlinops's operator."""
        library, linalg = importlib.import_module("curvlinops"), importlib.import_module("scipy.sparse.linalg")
        data = [(self.x, self.y)]
        operator = library.HessianLinearOperator(
            self.net, nn.CrossEntropyLoss(), self.weights, data, check_deterministic=False
        )
        return torch.tensor(linalg.eigsh(operator.to_scipy(), k=1, which="LA", tol=1e-3, return_eigenvectors=False)[0])

    def eigenthings(self) -> Tensor:
        """Returns what hessian-eigenthings finds."""
        library = importlib.import_module("hessian_eigenthings")
        loss = library.supervised_loss(nn.functional.cross_entropy)
        operator = library.HessianOperator(self.net, [(self.x, self.y)], loss)
        return library.lanczos(operator, k=1, max_iter=20, which="LA", seed=0).eigenvalues[0]


def flat(tensors: Any) -> Tensor:
    """Returns tensors as one vector."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def measure(problem: Regression | Network, rounds: int) -> dict[str, dict[str, Any]]:
    """Returns error and cost of each method that can be imported; all of them take turns."""
    found: dict[str, dict[str, Any]] = {}
    costs: dict[str, list[float]] = {}
    methods = problem.methods()
    for name, method in list(methods.items()):
        try:
            found[name] = {"error": problem.error(method())}
        except ImportError:
            del methods[name]
    for _ in watched(range(rounds), "rounds"):
        for name, method in methods.items():
            unit = seconds_of(problem.unit)
            costs.setdefault(name, []).append(seconds_of(method) / statistics.mean([unit, seconds_of(problem.unit)]))
    for name, values in costs.items():
        found[name] |= {"cost": statistics.median(values), "least": min(values), "most": max(values)}
    return found


def versions() -> dict[str, str]:
    """Returns the versions of the libraries that are installed."""
    found = {}
    for package in PACKAGES.values():
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def main(argv: list[str] | None = None) -> None:
    """Measures everything, and prints a line for each method."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.peers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="a file to keep the figures in")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    regression = Regression()
    problems: dict[str, Regression | Network] = {
        f"hypergradient, condition number {regression.condition:.0f}": regression,
        "largest eigenvalue at the start": Network(0),
        "largest eigenvalue after 300 steps": Network(300),
    }
    kept: dict[str, Any] = {"about": {**about(), "rounds": args.rounds, "libraries": versions()}, "peers": {}}
    for name, problem in problems.items():
        print(f"\n{name:56}{'error':>10} {'cost':>8}")
        kept["peers"][name] = measure(problem, args.rounds)
        for method, one in kept["peers"][name].items():
            print(f"{method:56}{one['error']:10.1e} {one['cost']:8.1f}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
