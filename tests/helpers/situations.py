"""Situations with a known fault, and healthy ones: what a diagnosis has to name, and where it has to be silent."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_wine
from torch import Tensor, nn

from lightning_ifthpo import IFTHypergradient, implicit_hypergradient
from lightning_ifthpo.core.loss import Loss
from lightning_ifthpo.optimizers.update_rule import UpdateRule
from lightning_ifthpo.solvers import (
    Amortized,
    ConjugateGradient,
    Direct,
    Identity,
    MinimumResidual,
    Neumann,
    Nystrom,
    Solver,
)
from lightning_ifthpo.solvers.causes import Cause
from tests.helpers.device import DEVICE, randn
from tests.helpers.trainers import Classifier, Ridge, quiet_trainer

SINGLE, DOUBLE = torch.float32, torch.float64
LOOSE, TIGHT = {"max_iterations": 200, "rtol": 1e-3}, {"max_iterations": 400, "rtol": 1e-6}


@dataclass(frozen=True)
class Situation:
    """What somebody does, and what is wrong with it.

    Attributes:
        name: In words.
        run: Returns the diagnosis and whether the solve succeeded.
        cause: The true cause; None if nothing is wrong.
        words: What the diagnosis must say besides.
        never: What it must not advise, because it is so already.
    """

    name: str
    run: Callable[[], tuple[str, bool]]
    cause: Cause | None = None
    words: tuple[str, ...] = ()
    never: tuple[str, ...] = field(default=())


@dataclass(frozen=True)
class Problem:
    """Two losses, weights and hyperparameters."""

    inner: Callable[[], Any] | Loss
    outer: Callable[[], Any]
    weights: list[Tensor]
    hyperparameters: list[Tensor]

    def solved(self, solver: Solver, curvature: str = "hessian", **options: Any) -> tuple[str, bool]:
        """Returns the diagnosis of its hypergradient, or the error's text, and whether the solve succeeded."""
        arguments = (self.inner, self.outer, self.weights, self.hyperparameters)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "finite differences in .* are not reliable")
                result = implicit_hypergradient(*arguments, solver=solver, curvature=curvature, **options)
        except ValueError as error:
            return str(error), False
        return result.diagnosis, result.status.succeeded


def detached(name: str, dtype: torch.dtype = SINGLE) -> Problem:
    """Losses of which a part that depends on the weights is detached."""
    x, w = randn(24, 4, seed=1, dtype=dtype), randn(4, 3, seed=2, dtype=dtype).requires_grad_()
    y, decay = torch.arange(24, device=DEVICE) % 3, torch.tensor(0.1, dtype=dtype, device=DEVICE)

    def inner() -> Tensor:
        z = x @ w
        if name == "stopped target":
            loss = (z[:, 0] - 1.0 - 0.9 * z[:, 1].roll(1).detach() - 0.9 * z[:, 0].roll(1).detach()).square().mean()
        elif name == "straight-through estimator":
            loss = F.cross_entropy(z + (z.sign() - z).detach(), y)
        else:
            chosen = z.log_softmax(1)[torch.arange(24), y]
            loss = -(chosen.exp().detach() * chosen).mean()
        return loss + decay * w.square().sum() / 2

    return Problem(inner, lambda: F.cross_entropy(x @ w, y), [w], [decay])


def detached_decay(name: str) -> Problem:
    """Softmax regression whose decays are partly detached."""
    problem = softmax()
    w, factors = problem.weights[0], torch.tensor([0.3, 0.6], dtype=DOUBLE, device=DEVICE)

    def inner() -> Tensor:
        used = {
            "a decay of which half is detached": lambda: (factors + factors.detach()) / 2,
            "a decay over its own mean, detached": lambda: factors / factors.mean().detach(),
            "a decay that is rounded straight through": lambda: (
                factors + ((10 * factors).round() / 10 - factors).detach()
            ),
        }[name]()
        return problem.inner()[0] + (used * torch.stack([w[:9].square().sum(), w[9:].square().sum()])).sum()

    return Problem(inner, problem.outer, problem.weights, [factors])


def quadratic(values: Tensor | list[float], dtype: torch.dtype = DOUBLE, v: Tensor | None = None) -> Problem:
    """½ (w − λt)ᵀ A (w − λt) at w = λt, with eigenvalues of A in a random basis; L_V = vᵀw."""
    values = torch.as_tensor(values, dtype=DOUBLE)
    size = len(values)
    basis = torch.linalg.qr(randn(size, size, seed=3, dtype=DOUBLE).cpu()).Q
    root = (basis * values.abs().sqrt()).T.to(DEVICE, dtype)
    sign = values.sign().to(DEVICE, dtype)
    target = torch.linspace(1.0, 2.0, size, dtype=dtype, device=DEVICE)
    w, lam = target.clone().requires_grad_(), torch.tensor(1.0, dtype=dtype, device=DEVICE)
    slope = randn(size, seed=4, dtype=dtype) if v is None else v.to(DEVICE, dtype)

    def inner() -> tuple[Tensor, Tensor]:
        outputs = root @ (w - lam * target)
        return (sign * outputs.square()).sum() / 2, outputs

    return Problem(inner, lambda: slope @ w, [w], [lam])


def spread(exponent: float, size: int = 40) -> Tensor:
    """Eigenvalues 10^−exponent … 1."""
    return torch.logspace(-exponent, 0, size, dtype=DOUBLE)


def low_rank(dtype: torch.dtype = DOUBLE, size: int = 30, rank: int = 12) -> Problem:
    return quadratic(torch.cat([torch.zeros(size - rank), torch.linspace(0.5, 1.0, rank)]), dtype)


def in_range(problem: Problem) -> Problem:
    """The same inner loss, with an outer gradient in the range of its Hessian."""
    w = problem.weights[0]
    (loss, _), direction = problem.inner(), randn(len(w), seed=5, dtype=w.dtype)
    (gradient,) = torch.autograd.grad(loss, [w], create_graph=True)
    (image,) = torch.autograd.grad(gradient, [w], direction)
    return Problem(problem.inner, lambda: image @ w, problem.weights, problem.hyperparameters)


def softmax(
    dtype: torch.dtype = DOUBLE, *, decay: float = 1e-2, trained_decay: float | None = None, steps: int = 12
) -> Problem:
    """Softmax regression on wine with weight decay, after some steps of Newton's method."""
    inputs, labels = (torch.tensor(array) for array in load_wine(return_X_y=True))
    inputs = ((inputs - inputs.mean(0)) / inputs.std(0)).to(DEVICE, dtype)
    labels = labels.to(DEVICE)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    inner_part, outer_part = order[:100], order[100:]
    flat, lam = torch.zeros(42, dtype=dtype, device=DEVICE), torch.tensor(decay, dtype=dtype, device=DEVICE).log()

    def loss_at(w: Tensor, log_decay: Tensor, part: Tensor) -> tuple[Tensor, Tensor]:
        outputs = inputs[part] @ w[:39].view(13, 3) + w[39:]
        return F.cross_entropy(outputs, labels[part]) + log_decay.exp() * w.square().sum() / 2, outputs

    used = lam if trained_decay is None else torch.tensor(trained_decay, dtype=dtype, device=DEVICE).log()
    for _ in range(steps):
        slope = torch.func.grad(lambda w: loss_at(w, used, inner_part)[0])(flat)
        flat = flat - torch.linalg.solve(torch.func.hessian(lambda w: loss_at(w, used, inner_part)[0])(flat), slope)
    w = flat.clone().requires_grad_()
    nothing = torch.full_like(lam, -torch.inf)
    return Problem(lambda: loss_at(w, lam, inner_part), lambda: loss_at(w, nothing, outer_part)[0], [w], [lam])


def another_batch() -> Problem:
    """The inner loss on examples on which the weights were not trained."""
    problem = softmax(decay=1e-3)
    x, y = randn(20, 13, seed=8, dtype=DOUBLE), torch.arange(20, device=DEVICE) % 3
    w, lam = problem.weights[0], problem.hyperparameters[0]

    def inner() -> Tensor:
        outputs = x @ w[:39].view(13, 3) + w[39:]
        return F.cross_entropy(outputs, y) + lam.exp() * w.square().sum() / 2

    return Problem(inner, problem.outer, problem.weights, problem.hyperparameters)


def network(dtype: torch.dtype = SINGLE, *, sign: float = 1.0, seed: int = 0, decay: float = -6.0) -> Problem:
    """A small network as it was initialized, with weight decay."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(4, 12), nn.Tanh(), nn.Linear(12, 3)).to(DEVICE, dtype)
    x, lam = randn(48, 4, seed=1, dtype=dtype), torch.tensor(decay, dtype=dtype, device=DEVICE)
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0.5).long()

    def inner() -> tuple[Tensor, Tensor]:
        outputs = net(x[:32])
        penalty = lam.exp() * sum(p.square().sum() for p in net.parameters()) / 2
        return sign * F.cross_entropy(outputs, y[:32]) + penalty, outputs

    return Problem(inner, lambda: F.cross_entropy(net(x[32:]), y[32:]), list(net.parameters()), [lam])


def one_weight(inner: Callable[..., Tensor], outer: Callable[..., Tensor], start: list[float]) -> Problem:
    """Losses as functions of weights and a hyperparameter of one."""
    w, lam = torch.tensor(start, dtype=DOUBLE, device=DEVICE, requires_grad=True), torch.tensor(1.0, dtype=DOUBLE)
    lam = lam.to(DEVICE)
    return Problem(lambda: inner(w, lam), lambda: outer(w, lam), [w], [lam])


def convex(w: Tensor, lam: Tensor) -> Tensor:
    return (lam * (w - 1.0).square()).sum()


def norm_squared(w: Tensor, lam: Tensor) -> Tensor:
    return w.square().sum()


class _Crooked(torch.autograd.Function):
    """x² / 2 with a derivative that has an antisymmetric part."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square().sum() / 2

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return slope * (x + 0.5 * (x.roll(1) - x.roll(-1)))


def crooked(strength: float = 1.0, dtype: torch.dtype = DOUBLE, *, unchecked: bool = False) -> Problem:
    w = torch.linspace(-1.0, 1.0, 20, dtype=dtype, device=DEVICE, requires_grad=True)
    lam, scale = torch.tensor(1.0, dtype=dtype, device=DEVICE), torch.linspace(0.5, 2.0, 20, dtype=dtype, device=DEVICE)
    inner = Loss(lambda: strength * lam * _Crooked.apply(scale * w), [w], is_verified=unchecked)
    return Problem(inner, lambda: (w + 1).square().sum(), [w], [lam])


def random_loss(dtype: torch.dtype = DOUBLE) -> Problem:
    """A quadratic whose curvature changes from call to call, from a source that nothing can put back."""
    calls = itertools.count()
    w = torch.linspace(-1.0, 1.0, 20, dtype=dtype, device=DEVICE, requires_grad=True)
    lam = torch.tensor(1.0, dtype=dtype, device=DEVICE)

    def inner() -> Tensor:
        noise = 1.0 + 0.5 * randn(20, seed=next(calls), dtype=dtype)
        return lam * (noise * w.square()).sum()

    return Problem(inner, lambda: (w + 1).square().sum(), [w], [lam])


def two_heads(used: bool) -> Problem:
    """The outer loss uses two tensors of weights; the inner loss uses the first of them, or a copy of it."""
    first, second = (torch.tensor(x, dtype=DOUBLE, device=DEVICE, requires_grad=True) for x in ([1.0, 2.0], [3.0, 4.0]))
    known = first if used else first.detach().clone().requires_grad_()
    lam, target = torch.tensor(1.0, dtype=DOUBLE, device=DEVICE), known.detach().clone()
    return Problem(
        lambda: (known - lam * target).square().sum() / 2,
        lambda: first.sum() + second.square().sum(),
        [first, second],
        [lam],
    )


def fitted(make: Callable[[], Any], solver: Solver | None, curvature: str = "hessian", **options: Any) -> Any:
    """Returns what a hyper step in a Trainer says: the text of its error and False, or nothing and True."""

    def run() -> tuple[str, bool]:
        torch.manual_seed(0)
        callback = IFTHypergradient(every_n_batches=1, solver=solver, curvature=curvature, on_failure="raise")
        try:
            quiet_trainer(callbacks=[callback], **({"max_epochs": 2} | options)).fit(make())
        except (RuntimeError, ValueError) as error:
            text = str(error)
            return text.split("': ", 1)[1] if "ended with status" in text else text, False
        return "", True

    return run


class Bent(Ridge):
    """Ridge regression with a concave penalty: a saddle everywhere."""

    def inner_loss(self, batch: Any) -> Tensor:
        return super().inner_loss(batch) - 3.0 * self.w.square().sum()


class Underdetermined(Ridge):
    """Three examples for four weights, and no decay."""

    def inner_loss(self, batch: Any) -> Tensor:
        x, y = batch
        return self.log_decay.exp() * (self.mark_outputs(x[:3] @ self.w) - y[:3]).square().mean() / 2


class RootOfZero(Ridge):
    """A penalty w^1.5, whose second derivative at zero is infinite."""

    def inner_loss(self, batch: Any) -> Tensor:
        return super().inner_loss(batch) + (0 * self.w).abs().pow(1.5).sum()


CG, MINRES = ConjugateGradient, MinimumResidual
GAUSS_NEWTON, AUTO = ("use Gauss–Newton",), ("use step_size='auto'",)
SCALED_STEP = UpdateRule(step_size=torch.linspace(1.0, 60.0, 42, dtype=DOUBLE, device=DEVICE))
NEGATIVE, NEAR = [3.0, 2.0, 1.0, 0.5, -0.3], torch.ones(5)
DEFINITE = [3.0, 2.0, 1.0, 0.5, 0.3]


def at(problem: Callable[..., Problem], *arguments: Any, solver: Solver, **options: Any) -> Any:
    """Returns a run that makes the problem first."""
    names = ("curvature", "x0", "allow_unused", "diagnosed")
    solving = {name: options.pop(name) for name in names if name in options}
    return lambda: problem(*arguments, **options).solved(solver, **solving)


def faulty() -> list[Situation]:
    """Returns the situations with a fault."""
    step, negative, singular = Cause.STEP_TOO_LONG, Cause.NEGATIVE_CURVATURE, Cause.SINGULAR
    zeros_wanted: dict[str, Any] = {"solver": CG(), "allow_unused": True}
    slow, rounding, minimum = Cause.ILL_CONDITIONED, Cause.ROUNDING, Cause.NOT_AT_MINIMUM
    return [
        Situation("Neumann, step 50 × too long", at(softmax, solver=Neumann(terms=50, step_size=50.0)), step),
        Situation(
            "the same under Gauss–Newton, float32",
            at(softmax, SINGLE, solver=Neumann(terms=50, step_size=50.0), curvature="gauss_newton"),
            step,
            never=GAUSS_NEWTON,
        ),
        Situation(
            "Neumann, step 3 / λ_max, damped",
            at(quadratic, DEFINITE, solver=Neumann(terms=99, step_size=1.0, damping=0.1)),
            step,
        ),
        Situation(
            "Neumann without safeguard, overflowing",
            at(quadratic, DEFINITE, solver=Neumann(terms=2000, step_size=2.0, safeguard=False)),
            step,
        ),
        Situation(
            "Neumann without safeguard, a few terms",
            at(quadratic, DEFINITE, solver=Neumann(terms=6, step_size=2.0, safeguard=False)),
            step,
        ),
        Situation(
            "Neumann with the optimizer's step, preconditioned",
            at(softmax, solver=Neumann(terms=50, step_size="optimizer").with_optimizer(SCALED_STEP)),
            step,
            never=AUTO,
        ),
        Situation(
            "Identity, step 30 × too long",
            at(quadratic, DEFINITE, v=NEAR, solver=Identity(step_size=30.0)),
            step,
            never=AUTO,
        ),
        Situation("in a Trainer, a series with η = 10", fitted(Ridge, Neumann(terms=30, step_size=10.0)), step),
        Situation("saddle, CG", at(quadratic, NEGATIVE, solver=CG(**TIGHT)), negative, ("a damping above 0.3",)),
        Situation("saddle, CG in float32", at(quadratic, NEGATIVE, SINGLE, solver=CG(**LOOSE)), negative),
        Situation(
            "saddle, damped too little",
            at(quadratic, NEGATIVE, solver=CG(damping=0.1, **TIGHT)),
            negative,
            ("beyond the damping of 0.1", "a damping above 0.3"),
        ),
        Situation(
            "saddle, preconditioned CG",
            at(quadratic, NEGATIVE, solver=CG(preconditioner=Nystrom(rank=2), **TIGHT)),
            negative,
        ),
        Situation(
            "saddle, measured Neumann", at(quadratic, NEGATIVE, solver=Neumann(terms=50)), negative, never=("Neumann",)
        ),
        Situation("saddle, Nyström", at(quadratic, NEGATIVE, solver=Nystrom(rank=5, damping=0.1)), negative),
        Situation(
            "saddle, Amortized",
            at(
                one_weight,
                lambda w, lam: lam * (w[0] ** 2 - w[1] ** 2),
                lambda w, lam: w.sum(),
                [1.0, 1.0],
                solver=Amortized(horizon=1000).with_optimizer(UpdateRule(0.1)),
                x0=torch.tensor([0.0, 1.0], dtype=DOUBLE, device=DEVICE),
            ),
            negative,
        ),
        Situation("maximum, CG", at(quadratic, [-1.0, -2.0, -3.0], solver=CG(**TIGHT)), negative),
        Situation(
            "half up, half down",
            at(
                one_weight,
                lambda w, lam: lam * (w[0] ** 2 - w[1] ** 2),
                lambda w, lam: w.sum(),
                [1.0, 1.0],
                solver=CG(),
            ),
            negative,
        ),
        Situation("network at its start, CG", at(network, solver=CG(**LOOSE)), negative),
        Situation(
            "concave loss under Gauss–Newton",
            at(network, sign=-1.0, solver=CG(**LOOSE), curvature="gauss_newton"),
            negative,
            never=GAUSS_NEWTON,
        ),
        Situation("in a Trainer, a concave penalty", fitted(Bent, CG(max_iterations=20), max_epochs=1), negative),
        Situation(
            "fewer residuals than weights, CG",
            at(low_rank, solver=CG(**TIGHT), curvature="gauss_newton"),
            singular,
            never=GAUSS_NEWTON,
        ),
        Situation("the same in float32", at(low_rank, SINGLE, solver=CG(**LOOSE)), singular),
        Situation("the same, MINRES", at(low_rank, solver=MINRES(**TIGHT)), singular, never=("use MinimumResidual()",)),
        Situation("the same, MINRES in float32", at(low_rank, SINGLE, solver=MINRES(**LOOSE)), singular),
        Situation(
            "the same, preconditioned CG", at(low_rank, solver=CG(preconditioner=Nystrom(rank=5), **TIGHT)), singular
        ),
        Situation(
            "a zero eigenvalue between both signs, MINRES",
            at(quadratic, [-1.0, 0.0, 2.0, 3.0], solver=MINRES(**TIGHT)),
            singular,
        ),
        Situation(
            "in a Trainer, three examples for four weights",
            fitted(Underdetermined, CG(max_iterations=50, rtol=1e-6)),
            singular,
        ),
        Situation(
            "condition 1e6, 20 iterations of CG",
            at(quadratic, spread(6), solver=CG(max_iterations=20, rtol=1e-6)),
            slow,
        ),
        Situation(
            "condition 1e8, 40 iterations of CG",
            at(quadratic, spread(8), solver=CG(max_iterations=40, rtol=1e-6)),
            slow,
        ),
        Situation(
            "condition 1e4 in float32", at(quadratic, spread(4), SINGLE, solver=CG(max_iterations=20, rtol=1e-3)), slow
        ),
        Situation("condition 1e6, MINRES", at(quadratic, spread(6), solver=MINRES(max_iterations=15, rtol=1e-4)), slow),
        Situation(
            "condition 1e6, preconditioned",
            at(quadratic, spread(6, 80), solver=CG(max_iterations=10, rtol=1e-6, preconditioner=Nystrom(rank=3))),
            slow,
        ),
        Situation(
            "worse than zero after 20 iterations",
            at(quadratic, spread(8), v=torch.ones(40), solver=CG(max_iterations=20)),
            slow,
        ),
        Situation(
            "rtol 1e-7 in float32, CG",
            at(quadratic, spread(3), SINGLE, solver=CG(max_iterations=1000, rtol=1e-7)),
            rounding,
            ("float64",),
        ),
        Situation(
            "rtol 1e-6 in float32, MINRES",
            at(quadratic, spread(3), SINGLE, solver=MINRES(max_iterations=1000, rtol=1e-6)),
            rounding,
        ),
        Situation(
            "rtol 1e-14 in float64",
            at(quadratic, spread(4), solver=CG(max_iterations=1000, rtol=1e-14)),
            rounding,
            never=("use float64",),
        ),
        Situation(
            "rtol 1e-6 in float32, real data",
            at(softmax, SINGLE, decay=1e-4, solver=CG(max_iterations=1000, rtol=1e-6)),
            rounding,
        ),
        Situation(
            "a random loss, CG",
            at(random_loss, solver=CG(**LOOSE), curvature="finite_difference"),
            Cause.NOT_THE_SAME_MAP,
        ),
        Situation(
            "a random loss, MINRES",
            at(random_loss, solver=MINRES(**LOOSE), curvature="finite_difference"),
            Cause.NOT_THE_SAME_MAP,
        ),
        Situation(
            "a random loss in float32",
            at(random_loss, SINGLE, solver=CG(**LOOSE), curvature="finite_difference"),
            Cause.NOT_THE_SAME_MAP,
        ),
        Situation("wrong derivative, CG", at(crooked, unchecked=True, solver=CG(**TIGHT)), Cause.NOT_SYMMETRIC),
        Situation(
            "a wrong derivative, MINRES", at(crooked, unchecked=True, solver=MINRES(**TIGHT)), Cause.NOT_SYMMETRIC
        ),
        Situation(
            "a wrong derivative by differences",
            at(crooked, 1.0, SINGLE, solver=CG(**LOOSE), curvature="finite_difference"),
            Cause.NOT_SYMMETRIC,
            never=("finite_difference",),
        ),
        Situation(
            "NaN in the weights",
            at(one_weight, convex, norm_squared, [float("nan"), 2.0], solver=CG()),
            Cause.NOT_FINITE,
            ("in the weights", "the first training loss that is not finite"),
            never=("outer batch",),
        ),
        Situation(
            "NaN in the outer loss",
            at(one_weight, convex, lambda w, lam: (w * torch.nan).sum(), [1.0, 2.0], solver=CG()),
            Cause.NOT_FINITE,
            ("in the outer loss",),
        ),
        Situation(
            "infinite outer gradient",
            at(one_weight, convex, lambda w, lam: (0 * w).abs().sqrt().sum() + w.sum(), [1.0, 2.0], solver=CG()),
            Cause.NOT_FINITE,
            ("the gradient of the outer loss",),
        ),
        Situation(
            "NaN in the inner loss",
            at(one_weight, lambda w, lam: convex(w, lam) * torch.nan, norm_squared, [1.0, 2.0], solver=MINRES()),
            Cause.NOT_FINITE,
            ("in the inner loss",),
        ),
        Situation(
            "infinite inner gradient",
            at(one_weight, lambda w, lam: convex(w, lam) + w.abs().sqrt().sum(), norm_squared, [0.0, 2.0], solver=CG()),
            Cause.NOT_FINITE,
            ("the gradient of the inner loss",),
        ),
        Situation(
            "infinite second derivative",
            at(
                one_weight,
                lambda w, lam: convex(w, lam) + w.abs().pow(1.5).sum(),
                norm_squared,
                [0.0, 2.0],
                solver=CG(),
            ),
            Cause.NOT_FINITE,
            ("the second derivative",),
        ),
        Situation(
            "infinite mixed derivative",
            at(
                one_weight,
                lambda w, lam: convex(w, (lam - 1.0).abs().sqrt() + 1.0),
                norm_squared,
                [2.0, 3.0],
                solver=CG(),
            ),
            Cause.NOT_FINITE,
            ("the mixed derivative",),
        ),
        Situation(
            "in a Trainer, w^1.5 at zero", fitted(RootOfZero, CG()), Cause.NOT_FINITE, ("the second derivative",)
        ),
        Situation(
            "outer loss of the hyperparameter alone",
            at(one_weight, convex, lambda w, lam: (w.detach() * lam).sum() + lam, [1.0, 2.0], solver=CG()),
            Cause.ZERO_RIGHT_HAND_SIDE,
        ),
        Situation(
            "outer loss times zero",
            at(one_weight, convex, lambda w, lam: 0 * w.sum() + lam, [1.0, 2.0], solver=MINRES()),
            Cause.ZERO_RIGHT_HAND_SIDE,
        ),
        Situation(
            "an outer loss that is saturated",
            at(one_weight, convex, lambda w, lam: F.relu(w - 9).sum() + lam, [1.0, 2.0], solver=Direct()),
            Cause.ZERO_RIGHT_HAND_SIDE,
        ),
        Situation(
            "stale weights, of another decay", at(softmax, decay=1e-3, trained_decay=1.0, solver=CG(**TIGHT)), minimum
        ),
        Situation(
            "stale weights, MINRES in float32",
            at(softmax, SINGLE, decay=1e-2, trained_decay=3.0, solver=MINRES(**LOOSE)),
            minimum,
        ),
        Situation("weights before training", at(softmax, steps=0, solver=Direct()), minimum),
        Situation(
            "one step of Newton's method",
            at(softmax, steps=1, decay=1e-3, solver=CG(**TIGHT), curvature="gauss_newton"),
            minimum,
        ),
        Situation("the weights of another batch", lambda: another_batch().solved(CG(**TIGHT)), minimum),
        Situation(
            "a loss without a minimum, e^−w",
            at(
                one_weight,
                lambda w, lam: lam * (-w).exp().sum(),
                lambda w, lam: (-w).exp().sum(),
                [1.0, 2.0],
                solver=CG(**TIGHT),
            ),
            minimum,
        ),
        Situation(
            "a linear loss",
            at(one_weight, lambda w, lam: lam * w.sum(), norm_squared, [1.0, 2.0], solver=CG(**TIGHT)),
            minimum,
            ("no curvature",),
        ),
        Situation(
            "a hyperparameter that no loss uses",
            at(one_weight, lambda w, lam: (w - 1.0).square().sum(), norm_squared, [1.0, 1.5], solver=CG()),
            Cause.NO_INFLUENCE,
            ("sweep",),
        ),
        Situation(
            "the same, with zeros wanted",
            at(one_weight, lambda w, lam: (w - 1.0).square().sum(), norm_squared, [1.0, 1.0], **zeros_wanted),
            Cause.NO_INFLUENCE,
        ),
        Situation(
            "a hyperparameter in the value, not in the gradient",
            at(one_weight, lambda w, lam: (w - 1.0).square().sum() + lam, norm_squared, [1.0, 1.0], **zeros_wanted),
            Cause.NO_INFLUENCE,
        ),
        Situation(
            "a hyperparameter times zero",
            at(
                one_weight,
                lambda w, lam: (w - 1.0).square().sum() + 0 * lam * w.sum(),
                norm_squared,
                [1.0, 1.0],
                solver=MINRES(),
            ),
            Cause.NO_INFLUENCE,
        ),
        *[
            Situation(
                f"{name}, {type(solver).__name__}", partial(detached(name).solved, solver), Cause.NOT_ITS_GRADIENT
            )
            for name, solver in [
                ("advantage of a policy gradient", Direct(damping=1.0)),
                ("stopped target", CG(damping=1.0, **LOOSE)),
                ("straight-through estimator", MINRES(damping=1.0, **LOOSE)),
            ]
        ],
        *[
            Situation(
                f"{name}, {type(solver).__name__}", partial(detached_decay(name).solved, solver), Cause.NOT_ITS_GRADIENT
            )
            for name, solver in [
                ("a decay of which half is detached", Direct()),
                ("a decay over its own mean, detached", CG(**LOOSE)),
                ("a decay that is rounded straight through", MINRES(**LOOSE)),
            ]
        ],
        Situation(
            "weights of which the inner loss knows a copy",
            lambda: two_heads(False).solved(CG(**TIGHT)),
            Cause.UNKNOWN_WEIGHTS,
        ),
        Situation(
            "a head that only the outer loss uses, CG",
            lambda: two_heads(True).solved(CG(**TIGHT)),
            Cause.UNKNOWN_WEIGHTS,
        ),
        Situation(
            "a head that only the outer loss uses, MINRES",
            lambda: two_heads(True).solved(MINRES(**TIGHT)),
            Cause.UNKNOWN_WEIGHTS,
        ),
    ]


def healthy() -> list[Situation]:
    """Returns the situations without a fault."""
    found = []
    solvers: list[Solver] = [
        CG(**LOOSE), MINRES(**LOOSE), CG(preconditioner=Nystrom(rank=5), **LOOSE), Direct(), Nystrom(rank=42),
        CG(max_iterations=30), MINRES(max_iterations=30), Neumann(terms=20), Neumann(terms=3, step_size=0.1),
        Identity(step_size=0.1), Amortized(),
    ]  # fmt: skip
    for dtype, curvature, solver in itertools.product((SINGLE, DOUBLE), ("hessian", "gauss_newton"), solvers):
        run = at(softmax, dtype, solver=solver, curvature=curvature)
        found.append(Situation(f"softmax regression, {curvature}, {dtype}, {solver}", run))
    damped: list[Solver] = [CG(damping=1e-2, **LOOSE), MINRES(damping=1e-2, **LOOSE), Nystrom(rank=20, damping=1e-2)]
    for seed, solver in itertools.product((0, 1), [*damped, Neumann(terms=10, damping=1e-2), Amortized()]):
        trained = solver.with_optimizer(UpdateRule(0.1))
        run = at(network, seed=seed, solver=trained, curvature="gauss_newton")
        found.append(Situation(f"network in training, {solver}, {seed}", run))
    for name, curvature in (
        ("CG", "finite_difference"),
        ("K-FAC", "kfac"),
        ("outer product", "gradient_outer_product"),
    ):
        solver = CG(**LOOSE) if name == "CG" else Direct(damping=0.1)
        if name != "K-FAC":
            found.append(Situation(f"softmax regression, {curvature}", at(softmax, solver=solver, curvature=curvature)))
    for dtype, solver in itertools.product((SINGLE, DOUBLE), (CG(**LOOSE), MINRES(**LOOSE), Direct(), MINRES())):
        found.append(
            Situation(
                f"singular and consistent, {dtype}, {solver}", lambda d=dtype, s=solver: in_range(low_rank(d)).solved(s)
            )
        )
    for dtype, solver in itertools.product(
        (SINGLE, DOUBLE), (MINRES(max_iterations=40), Direct(), CG(damping=0.1, **LOOSE), Amortized())
    ):
        found.append(Situation(f"singular, {dtype}, {solver}", at(low_rank, dtype, solver=solver)))
    found += [
        Situation("indefinite, MINRES", at(quadratic, NEGATIVE, solver=MINRES(**TIGHT))),
        Situation("indefinite, Direct", at(quadratic, NEGATIVE, solver=Direct())),
        Situation("indefinite, damped enough", at(quadratic, NEGATIVE, solver=CG(damping=0.5, **TIGHT))),
        Situation(
            "indefinite, damped enough, Nyström", at(quadratic, NEGATIVE, SINGLE, solver=Nystrom(rank=5, damping=0.5))
        ),
        Situation(
            "condition 1e4, enough iterations", at(quadratic, spread(4), solver=CG(max_iterations=500, rtol=1e-6))
        ),
        Situation("ridge regression in a Trainer", fitted(Ridge, CG(**TIGHT))),
        Situation("ridge regression in a Trainer, series", fitted(Ridge, Neumann(terms=20))),
        Situation("a network in a Trainer", fitted(Classifier, None, "gauss_newton")),
        Situation("a network in a Trainer, damped CG", fitted(Classifier, CG(damping=0.1), "gauss_newton")),
        Situation("a network in a Trainer, MINRES", fitted(Classifier, MINRES(), "gauss_newton")),
        Situation("a network in a Trainer, Neumann", fitted(Classifier, Neumann(terms=5), "gauss_newton")),
        Situation(
            "a network in a Trainer, Adam", fitted(lambda: Classifier(optimizer="Adam", lr=0.01), None, "gauss_newton")
        ),
    ]
    return found
