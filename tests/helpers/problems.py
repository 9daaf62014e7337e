"""Problems with known answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from sklearn.datasets import load_breast_cancer, load_digits, load_wine
from torch import Tensor, nn

from lightning_ifthpo.core.space import ParameterSpace
from lightning_ifthpo.curvature import CurvatureOperator, MatrixOperator, curvature_operator, mark_outputs
from tests.helpers.device import DEVICE, DTYPE, FLOAT64


def relative_error(got: Tensor, wanted: Tensor) -> float:
    got, wanted = got.detach(), wanted.detach()
    return float(torch.linalg.vector_norm(got - wanted) / torch.linalg.vector_norm(wanted))


def spd_matrix(size: int, condition: float, *, dtype: torch.dtype = DTYPE, signs: bool = False) -> Tensor:
    """A symmetric matrix with eigenvalues 1 … condition, geometrically spaced; with alternating signs if wanted."""
    values = torch.logspace(0, torch.log10(torch.tensor(condition)).item(), size, dtype=torch.float64)
    if signs:
        values[::2] *= -1
    basis, _ = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))
    matrix = basis @ torch.diag(values) @ basis.T
    return ((matrix + matrix.T) / 2).to(DEVICE, dtype)


def digits_data() -> tuple[Tensor, Tensor]:
    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images, **FLOAT64) / 16, torch.tensor(labels, device=DEVICE)


@dataclass
class SoftmaxRegression:
    """Softmax regression on digits with one log decay for each of its 650 weights."""

    weight: Tensor
    bias: Tensor
    log_decay: Tensor
    training: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]

    @classmethod
    def at_optimum(cls) -> SoftmaxRegression:
        images, labels = digits_data()
        problem = cls(
            weight=torch.zeros(10, 64, **FLOAT64, requires_grad=True),
            bias=torch.zeros(10, **FLOAT64, requires_grad=True),
            log_decay=torch.full((650,), -6.0, **FLOAT64),
            training=(images[:900], labels[:900]),
            validation=(images[900:], labels[900:]),
        )
        space = ParameterSpace(problem.parameters)
        flat = space.values
        for _ in range(8):  # Newton's method, which converges quadratically from zero
            slope = torch.func.grad(problem.inner_loss_at)(flat)
            flat = flat - torch.linalg.solve(torch.func.hessian(problem.inner_loss_at)(flat), slope)
        assert torch.func.grad(problem.inner_loss_at)(flat).norm() < 1e-12
        space.assign(flat)
        return problem

    @property
    def parameters(self) -> list[Tensor]:
        return [self.weight, self.bias]

    def logits(self, images: Tensor) -> Tensor:
        return images @ self.weight.T + self.bias

    def inner_loss(self) -> Tensor:
        images, labels = self.training
        flat = torch.cat([self.weight.reshape(-1), self.bias])
        penalty = (self.log_decay.exp() * flat.square()).sum() / 2
        return F.cross_entropy(mark_outputs(self.logits(images)), labels) + penalty

    def inner_loss_at(self, flat: Tensor) -> Tensor:
        """The inner loss as a function of the flat weights, [650]."""
        images, labels = self.training
        logits = images @ flat[:640].view(10, 64).T + flat[640:]
        return F.cross_entropy(logits, labels) + (self.log_decay.exp() * flat.square()).sum() / 2

    def outer_loss(self) -> Tensor:
        images, labels = self.validation
        return F.cross_entropy(self.logits(images), labels)

    def exact_hypergradient(self) -> Tensor:
        """By the dense Hessian of torch and its inverse; ∂²L_T/∂w∂λᵀ = diag(e^λ w)."""
        values = torch.cat([self.weight.reshape(-1), self.bias]).detach()
        hessian = torch.func.hessian(self.inner_loss_at)(values)
        v = torch.cat([g.reshape(-1) for g in torch.autograd.grad(self.outer_loss(), self.parameters)])
        return -self.log_decay.exp() * values * torch.linalg.solve(hessian, v)


def operator_of(values: Tensor, seed: int = 0, dtype: torch.dtype = DTYPE) -> MatrixOperator:
    """A dense operator with given eigenvalues, [n], in a random basis."""
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(len(values), len(values), dtype=torch.float64, generator=generator))
    matrix = basis @ torch.diag(values.cpu().double()) @ basis.T
    return MatrixOperator(((matrix + matrix.T) / 2).to(DEVICE, dtype))


SPECTRA = {
    "flat": torch.linspace(-1, 3, 1000),
    "bulk and outliers": torch.cat([0.05 * torch.linspace(-1, 1, 990) ** 3, torch.linspace(1, 5, 10)]),
    "geometric": torch.logspace(-6, 0, 1000),
    "two values": torch.cat([torch.zeros(600), torch.ones(400)]),
}


def quadratic(dtype: torch.dtype = torch.float64) -> tuple[nn.Parameter, Callable[[], Tensor]]:
    """A weight and its loss wᵀAw/2."""
    matrix = spd_matrix(6, 20.0, dtype=dtype)
    weight = nn.Parameter(torch.linspace(-1, 1, 6, dtype=dtype, device=DEVICE))
    return weight, lambda: weight @ matrix @ weight / 2


def ridge() -> tuple[Callable[[], Tensor], Callable[[], Tensor], Tensor, Tensor, Tensor]:
    """w* = (XᵀX/n + dI)⁻¹ Xᵀy/n, so that dL_V/dlog d is known in closed form."""
    x, y, xv, yv = (torch.randn(*shape, dtype=torch.float64).to(DEVICE) for shape in ((20, 4), (20,), (20, 4), (20,)))
    log_decay = torch.tensor(-1.0, **FLOAT64)
    gram = x.T @ x / 20 + log_decay.exp() * torch.eye(4, **FLOAT64)
    optimum = torch.linalg.solve(gram, x.T @ y / 20)
    closed_form = -(xv.T @ (xv @ optimum - yv) / 20) @ torch.linalg.solve(gram, log_decay.exp() * optimum)
    w = optimum.clone().requires_grad_()

    def inner() -> Tensor:
        return (x @ w - y).square().mean() / 2 + log_decay.exp() * w.square().sum() / 2

    def outer() -> Tensor:
        return (xv @ w - yv).square().mean() / 2

    return inner, outer, w, log_decay, closed_form


class LowRankOperator(CurvatureOperator):
    """Jᵀ S J with signs S, [r], by two products, so that it is as exact as a Gauss–Newton matrix and no more."""

    def __init__(self, jacobian: Tensor, signs: Tensor) -> None:
        self.jacobian, self.signs = jacobian, signs
        self.size, self.dtype, self.device = jacobian.shape[1], jacobian.dtype, jacobian.device

    def _product(self, v: Tensor) -> Tensor:
        return self.jacobian.T @ (self.signs * (self.jacobian @ v))


def low_rank(seed: int, dtype: torch.dtype, *, signs: bool, consistent: bool) -> tuple[LowRankOperator, Tensor, Tensor]:
    """A random matrix of rank r of n with eigenvalues 0.1 … 1, in float64 too, and a right-hand side, [n]."""
    generator = torch.Generator().manual_seed(seed)
    size = (5, 10, 30, 100)[seed % 4]
    rank = max(1, int(size * (0.2, 0.5, 0.8)[seed % 3]))
    basis = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator)).Q[:, :rank]
    values = 0.1 + 0.9 * torch.rand(rank, dtype=torch.float64, generator=generator)
    sign = torch.ones(rank, dtype=torch.float64)
    sign[::2] = -1.0 if signs else 1.0
    jacobian = (basis * values.sqrt()).T.contiguous().to(DEVICE, dtype)
    operator = LowRankOperator(jacobian, sign.to(DEVICE, dtype))
    matrix = jacobian.double().T @ (sign.to(DEVICE)[:, None] * jacobian.double())
    b = torch.randn(size, dtype=torch.float64, generator=generator).to(DEVICE)
    return operator, matrix, (matrix @ b if consistent else b).to(dtype)


class Real(NamedTuple):
    """A small model of real data, after some steps of gradient descent."""

    data: str
    model: str
    curvature: str
    steps: int

    def __str__(self) -> str:
        return "-".join(map(str, self))


REAL = [
    Real(data, model, curvature, steps)
    for data in ("digits", "wine", "cancer")
    for model in ("linear", "mlp")
    for curvature in ("hessian", "gauss_newton")
    for steps in (0, 200)
    if (data, model) != ("digits", "mlp") or steps
]


def real_curvature(data: str, model: str, curvature: str, steps: int) -> tuple[Tensor, Tensor]:
    """Returns the matrix in float32, [n, n], and the gradient of the validation loss, [n]."""
    load = {"digits": load_digits, "wine": load_wine, "cancer": load_breast_cancer}[data]
    inputs, labels = (torch.tensor(array) for array in load(return_X_y=True))
    inputs = ((inputs - inputs.mean(0)) / inputs.std(0).clamp_min(1e-6)).float().to(DEVICE)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[:400]
    inputs, labels = inputs[order], labels.to(DEVICE)[order]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        features, classes = inputs.shape[1], int(labels.max()) + 1
        layers = [nn.Linear(features, classes)]
        if model == "mlp":
            layers = [nn.Linear(features, 6), nn.Tanh(), nn.Linear(6, classes)]
        net = nn.Sequential(*layers).to(DEVICE)
    half = len(labels) // 2
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)

    def loss(part: slice) -> Tensor:
        return F.cross_entropy(mark_outputs(net(inputs[part])), labels[part])

    for _ in range(steps):
        optimizer.zero_grad()
        loss(slice(half)).backward()
        optimizer.step()
    parameters = list(net.parameters())
    matrix = curvature_operator(curvature, lambda: loss(slice(half)), parameters).to_dense()
    gradient = torch.autograd.grad(loss(slice(half, None)), parameters)
    return (matrix + matrix.T) / 2, torch.cat([g.reshape(-1) for g in gradient])
