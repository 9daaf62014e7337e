"""Implicit hypergradients against the dense exact one and closed forms."""

import pytest
import torch
import torch.nn.functional as F

from lightning_ifthpo import (
    implicit_hypergradient,
    unrolled_hypergradient,
)
from lightning_ifthpo.curvature import HessianOperator
from lightning_ifthpo.solvers import (
    Amortized,
    ConjugateGradient,
    Direct,
    Identity,
    MinimumResidual,
    Neumann,
    Status,
)
from tests.helpers.device import DEVICE, FLOAT64
from tests.helpers.networks import Net
from tests.helpers.problems import relative_error, ridge


def error_of(digits, **options):
    result = implicit_hypergradient(
        digits.inner_loss, digits.outer_loss, digits.parameters, [digits.log_decay], **options
    )
    return relative_error(result.gradients[0], digits.exact_hypergradient()), result


@pytest.mark.parametrize("curvature", ["hessian", "gauss_newton", "finite_difference"])
@pytest.mark.parametrize(
    ("solver", "bound"),
    [
        (ConjugateGradient(max_iterations=20), 0.02),
        (ConjugateGradient(max_iterations=100), 1e-9),
        (MinimumResidual(max_iterations=100), 1e-9),
        (Direct(), 1e-10),
    ],
    ids=repr,
)
def test_digits_equal_the_dense_hypergradient(digits, solver, bound, curvature):
    """650 weights and as many decays at the inner optimum, condition number about 425."""
    error, result = error_of(digits, solver=solver, curvature=curvature)
    # finite differences: an operator that is off by 1e-10, seen through the condition number
    assert error <= (max(bound, 1e-7) if curvature == "finite_difference" else bound)
    assert result.status.succeeded
    assert result.diagnosis == ""
    assert torch.equal(result.direct[0], torch.zeros_like(digits.log_decay))


@pytest.mark.parametrize("terms", [0, 1, 5, 20])
def test_neumann_equals_the_dense_partial_sum(digits, terms):
    dense = HessianOperator(digits.inner_loss, digits.parameters).to_dense()
    v = torch.cat([g.reshape(-1) for g in torch.autograd.grad(digits.outer_loss(), digits.parameters)])
    step, total, term = 0.5, v.clone(), v.clone()
    for _ in range(terms):
        term = term - step * dense @ term
        total = total + term
    _, result = error_of(digits, solver=Neumann(terms=terms, step_size=step))
    assert relative_error(result.solution.x, step * total) < 1e-10
    assert result.products == terms


def test_ridge_has_its_closed_form():
    inner, outer, w, log_decay, closed_form = ridge()
    result = implicit_hypergradient(inner, outer, [w], [log_decay])
    assert relative_error(result.gradients[0], closed_form) < 1e-6  # the default tolerance of the solver
    assert result.status is Status.CONVERGED


@pytest.mark.parametrize("exponent", [-10, 0, 10])
def test_scale_of_the_losses_does_not_matter(exponent):
    inner, outer, w, log_decay, closed_form = ridge()
    scale = 10.0**exponent
    result = implicit_hypergradient(lambda: scale * inner(), lambda: outer() / scale, [w], [log_decay])
    assert relative_error(scale * result.gradients[0], closed_form) < 1e-6


def test_odd_parameters_do_not_change_the_hypergradient():
    inner, outer, w, log_decay, closed_form = ridge()
    frozen, unused = torch.randn(3, **FLOAT64), torch.randn(2, **FLOAT64, requires_grad=True)
    result = implicit_hypergradient(inner, outer, [frozen, w, unused], [log_decay])
    assert relative_error(result.gradients[0], closed_form) < 1e-6
    assert result.solution.x.shape == (9,)


def test_singular_hessian_with_a_consistent_right_hand_side():
    """Two weights of which only the sum matters."""
    w, lam = torch.full((2,), 0.5, **FLOAT64, requires_grad=True), torch.tensor(1.0, **FLOAT64)
    for solver in (ConjugateGradient(), MinimumResidual(), Direct()):
        result = implicit_hypergradient(
            lambda: (w.sum() - lam).square() / 2, lambda: w.sum().square() / 2, [w], [lam], solver=solver
        )
        assert result.gradients[0].item() == pytest.approx(1.0)
        assert result.status.succeeded


def test_nothing_is_left_behind():
    x, y = torch.randn(8, 4, **FLOAT64), torch.arange(8, device=DEVICE) % 3
    net, log_decay = Net(dropout=0.0, **FLOAT64), torch.tensor(-3.0, **FLOAT64)
    weights = [p.detach().clone() for p in net.parameters()]

    def inner():
        return F.cross_entropy(net(x), y) + log_decay.exp() * sum(p.square().sum() for p in net.parameters())

    implicit_hypergradient(inner, lambda: F.cross_entropy(net(x), y), list(net.parameters()), [log_decay])
    assert all(torch.equal(p, w) and p.grad is None for p, w in zip(net.parameters(), weights, strict=True))
    assert not log_decay.requires_grad
    assert log_decay.grad is None


def test_flags_are_restored_after_an_exception():
    w, lam = torch.ones(1, requires_grad=True, device=DEVICE), torch.tensor(2.0, device=DEVICE)

    def broken():
        raise RuntimeError("user error")

    with pytest.raises(RuntimeError, match="user error"):
        implicit_hypergradient(broken, lambda: w.sum(), [w], [lam])
    assert not lam.requires_grad


def test_warm_start_and_solver_are_used():
    inner, outer, w, log_decay, closed_form = ridge()
    exact = implicit_hypergradient(inner, outer, [w], [log_decay], solver=Direct()).solution.x
    warm = implicit_hypergradient(inner, outer, [w], [log_decay], solver=ConjugateGradient(rtol=1e-6), x0=exact)
    assert warm.products == 1
    rough = implicit_hypergradient(inner, outer, [w], [log_decay], solver=Identity(step_size=1e-3))
    assert relative_error(rough.gradients[0], closed_form) > 0.9


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"hyperparameters": [torch.tensor(3, device=DEVICE)]},
            TypeError,
            "hyperparameter 0: expected a real floating-point",
        ),
        ({"hyperparameters": [torch.tensor(1j, device=DEVICE)]}, TypeError, "got torch.complex64"),
        ({"curvature": "fisher"}, ValueError, "expected curvature to be one of"),
        (
            {"outer_loss": lambda: torch.ones(2, requires_grad=True, device=DEVICE) * 2},
            ValueError,
            r"the outer loss: expected a scalar",
        ),
        ({"outer_loss": lambda: torch.tensor(1.0, device=DEVICE)}, ValueError, "the outer loss is detached"),
        ({"parameters": []}, ValueError, "at least one tensor"),
    ],
)
def test_refuses(options, error, message):
    w, lam = torch.ones(1, requires_grad=True, device=DEVICE), torch.tensor(1.0, device=DEVICE)
    arguments = {
        "inner_loss": lambda: (lam * w.square()).sum(),
        "outer_loss": lambda: w.sum(),
        "parameters": [w],
        "hyperparameters": [lam],
    }
    with pytest.raises(error, match=message):
        implicit_hypergradient(**(arguments | options))


def test_one_step_by_finite_differences_alone_is_the_first_order_method():
    """T1 − T2 without a second graph: five gradients of the inner loss at most, and what one step of training does."""
    inner, outer, w, log_decay, _ = ridge()
    calls = []

    def counted():
        calls.append(1)
        return inner()

    result = implicit_hypergradient(
        counted,
        outer,
        [w],
        [log_decay],
        curvature="finite_difference",
        solver=Identity(step_size=0.1),
        diagnosed=False,
    )
    unrolled = unrolled_hypergradient(inner, outer, [w], [log_decay], steps=1, lr=0.1)
    assert result.gradients[0].item() == pytest.approx(unrolled.gradients[0].item(), rel=1e-6)
    assert len(calls) <= 5


@pytest.mark.parametrize("diagnosed", [True, False])
def test_a_failure_is_diagnosed_where_that_is_asked_for(diagnosed):
    """At a saddle; without a diagnosis no products are spent on it."""
    w, lam = torch.tensor([1.0, 1.0], **FLOAT64, requires_grad=True), torch.tensor(1.0, **FLOAT64)
    signs = torch.tensor([1.0, -1.0], **FLOAT64)
    result = implicit_hypergradient(
        lambda: lam * (signs * w.square()).sum(), lambda: w.sum(), [w], [lam], diagnosed=diagnosed
    )
    assert result.status is Status.NEGATIVE_CURVATURE
    assert ("negative curvature (λ_min = -2, λ_max = 2)" in result.diagnosis) == diagnosed
    assert (result.diagnosis == "") != diagnosed


def test_a_diagnosis_is_that_of_the_damped_system():
    w, lam = torch.ones(2, **FLOAT64, requires_grad=True), torch.tensor(1.0, **FLOAT64)
    values = torch.tensor([3.0, -1.0], **FLOAT64)
    losses = (lambda: (lam * values * w.square()).sum() / 2, lambda: w.sum(), [w], [lam])
    result = implicit_hypergradient(*losses, solver=ConjugateGradient(damping=0.5))
    assert "negative curvature (λ_min = -0.5, λ_max = 3.5)" in result.diagnosis
    result = implicit_hypergradient(*losses, solver=Amortized(), x0=torch.tensor([0.0, 1.0], **FLOAT64))
    assert "negative curvature (λ_min = -1, λ_max = 3)" in result.diagnosis
