"""The check of hypergradients: what passes, and what is shown."""

import pytest
import torch
import torch.nn.functional as F

from lightning_ifthpo import (
    HypergradientMismatchError,
    LinearBestResponse,
    check_hypergradient,
    implicit_hypergradient,
    unrolled_hypergradient,
)
from lightning_ifthpo.curvature import HessianOperator
from lightning_ifthpo.solvers import (
    Direct,
    Identity,
)
from tests.helpers.device import FLOAT64, randn
from tests.helpers.problems import ridge


@pytest.mark.parametrize("reference", ["direct", "finite_difference"])
def test_check_passes_what_is_right_and_shows_what_is_wrong(reference):
    inner, outer, w, log_decay, _ = ridge()
    before = w.detach().clone(), log_decay.clone()
    assert check_hypergradient(inner, outer, [w], [log_decay], reference=reference, rtol=1e-5)
    assert torch.equal(w.detach(), before[0])
    assert torch.equal(log_decay, before[1])
    with pytest.raises(HypergradientMismatchError, match=r"(?s)more than rtol = 0.001.*got: .*expected: "):
        check_hypergradient(inner, outer, [w], [log_decay], reference=reference, solver=Identity())
    with pytest.raises(ValueError, match="reference"):
        check_hypergradient(inner, outer, [w], [log_decay], reference="autograd")


def test_check_by_finite_differences_is_independent_of_the_hessian(digits):
    log_decay = torch.full((), -4.0, **FLOAT64)
    w = torch.zeros(3, **FLOAT64, requires_grad=True)
    x, y = digits.training[0][:40, 20:23], (digits.training[1][:40] % 2).to(**FLOAT64)

    def inner():
        return F.binary_cross_entropy_with_logits(x @ w, y) + log_decay.exp() * w.square().sum() / 2

    for _ in range(8):  # Newton's method
        operator = HessianOperator(inner, [w])
        with torch.no_grad():
            w.sub_(torch.linalg.solve(operator.to_dense(), operator.gradient))
    assert check_hypergradient(inner, lambda: (x @ w).square().mean(), [w], [log_decay], reference="finite_difference")


def test_check_says_when_the_inner_problem_has_no_minimum():
    w, lam = torch.ones(1, **FLOAT64, requires_grad=True), torch.tensor(1.0, **FLOAT64)
    with pytest.raises(RuntimeError, match="Newton's method did not solve"):
        check_hypergradient(lambda: (lam * w.exp()).sum(), lambda: w.sum(), [w], [lam], reference="finite_difference")


def test_the_tolerance_and_the_curvature_are_those_that_are_asked_for():
    """In one dimension with H = 1 + e^0 = 2, where a step of 0.55 instead of 1/2 is wrong by 10 %."""
    w, log_decay = torch.ones(1, **FLOAT64, requires_grad=True), torch.tensor(0.0, **FLOAT64)
    losses = (
        lambda: ((w - 2) ** 2 / 2 + log_decay.exp() * w**2 / 2).sum(),
        lambda: (w**2).sum(),
        [w],
        [log_decay],
    )
    assert check_hypergradient(*losses, solver=Identity(step_size=0.55), rtol=0.11)
    with pytest.raises(HypergradientMismatchError, match=r"by 0.1 \(relative\), more than rtol = 0.09"):
        check_hypergradient(*losses, solver=Identity(step_size=0.55), rtol=0.09)
    with pytest.raises(HypergradientMismatchError, match="by 1 "):  # the gradient is zero here, and its outer product
        check_hypergradient(*losses, solver=Direct(), curvature="gradient_outer_product")


def test_an_outer_loss_of_the_hyperparameter_alone_is_checked_too():
    w, h = torch.tensor([1.0], dtype=torch.float64, requires_grad=True), torch.tensor(0.5, dtype=torch.float64)
    inner = lambda: ((w - h) ** 2).sum()  # noqa: E731
    for reference in ("direct", "finite_difference"):
        assert check_hypergradient(inner, lambda: h**2, [w], [h], reference=reference)


@pytest.mark.parametrize("scale", [1e-8, 1e6, 1e10])
@pytest.mark.parametrize("unit", [1e-6, 1.0, 1e6])
def test_finite_differences_do_not_depend_on_the_units_of_loss_and_weights(scale, unit):
    x, t = randn(40, 5, seed=2, dtype=torch.float64), randn(40, seed=3, dtype=torch.float64)
    decay = torch.tensor(0.3, **FLOAT64)
    w = torch.linalg.solve(x.T @ x / 40 + 2 * decay * torch.eye(5, **FLOAT64), x.T @ t / 40).div(unit).requires_grad_()

    def inner():
        return scale * (((unit * x @ w - t) ** 2).mean() / 2 + decay * unit**2 * (w**2).sum())

    assert check_hypergradient(inner, lambda: (w**2).sum(), [w], [decay], reference="finite_difference")


@pytest.mark.parametrize("size", [1e-8, 1e-3, 1e6])
def test_small_and_large_hyperparameters_are_moved_in_their_own_unit(size):
    """At 1e-8 a step of 6e-6 would lead to another slope of √h, and at 1e6 it would be rounding."""
    w, h = torch.ones(1, **FLOAT64), torch.tensor(size, **FLOAT64)
    w = (2.0 - (h / size).sqrt() / 2).reshape(1).requires_grad_()
    inner = lambda: ((w - 2 + (h / size).sqrt() / 2) ** 2).sum()  # noqa: E731
    assert check_hypergradient(inner, lambda: (w**2).sum(), [w], [h], reference="finite_difference")


def test_a_small_hyperparameter_without_a_scale_of_its_own_is_moved_farther():
    """At 1e-13 the relative step of 6e-6 would change the outer loss by less than rounding."""
    h = torch.tensor(1e-13, **FLOAT64)
    w = torch.ones(1, **FLOAT64, requires_grad=True)
    inner = lambda: ((w - 1 - h) ** 2).sum()  # noqa: E731
    assert check_hypergradient(inner, lambda: (w**2).sum(), [w], [h], reference="finite_difference")


def test_generators_are_taken_where_sequences_are_expected():
    """As `net.parameters()`, which can be read once."""
    net, hyper = torch.nn.Linear(3, 1, **FLOAT64), torch.nn.Linear(1, 1, **FLOAT64)
    x = randn(6, 3, seed=0, dtype=torch.float64)
    inner = lambda: (net(x) - hyper.bias).square().mean() + hyper.weight.exp().sum() * net.weight.square().sum()  # noqa: E731
    outer = lambda: (net(x) - 1).square().mean()  # noqa: E731

    def generators():
        return net.parameters(), hyper.parameters()

    lists = list(net.parameters()), list(hyper.parameters())
    wanted = implicit_hypergradient(inner, outer, *lists).gradients
    assert all(map(torch.equal, implicit_hypergradient(inner, outer, *generators()).gradients, wanted))
    wanted = unrolled_hypergradient(inner, outer, *lists, steps=2, lr=0.1).gradients
    assert all(map(torch.equal, unrolled_hypergradient(inner, outer, *generators(), steps=2, lr=0.1).gradients, wanted))
    assert check_hypergradient(inner, outer, *generators())
    response = LinearBestResponse(inner, *generators(), lr=0.1)
    response.step()
    assert len(response.hypergradient(outer).gradients) == 2
