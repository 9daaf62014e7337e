"""Hypergradients against the dense exact one, closed forms, and each other."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_ifthpo import (
    HypergradientMismatchError,
    LinearBestResponse,
    check_hypergradient,
    implicit_hypergradient,
    unrolled_hypergradient,
)
from lightning_ifthpo.curvature import HessianOperator
from lightning_ifthpo.optimizers.update_rule import UpdateRule
from lightning_ifthpo.solvers import (
    ConjugateGradient,
    Direct,
    Identity,
    MinimumResidual,
    Neumann,
    Status,
)
from tests.problems import Net, relative_error, spd_matrix


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


@pytest.mark.parametrize("terms", [0, 1, 5, 20])
def test_unrolled_steps_from_the_optimum_equal_neumann_terms(digits, terms):
    before = digits.weight.detach().clone()
    losses = (digits.inner_loss, digits.outer_loss, digits.parameters, [digits.log_decay])
    unrolled = unrolled_hypergradient(*losses, steps=terms + 1, lr=0.5)
    series = implicit_hypergradient(*losses, solver=Neumann(terms=terms, step_size=0.5))
    assert relative_error(unrolled.gradients[0], series.gradients[0]) < 1e-12
    assert unrolled.relative_residual == pytest.approx(series.relative_residual, rel=1e-9)
    assert unrolled.products == series.products
    assert torch.equal(digits.weight, before)


def test_unrolled_equals_backpropagation_through_the_loop():
    """Away from a stationary point, with a direct term, against autograd through the same steps."""
    torch.manual_seed(1)
    x, y = torch.randn(9, 3, dtype=torch.float64), torch.randn(9, dtype=torch.float64)
    w = torch.randn(3, dtype=torch.float64, requires_grad=True)
    h = torch.randn(3, dtype=torch.float64)

    def inner(weights, hyper):
        return (x @ weights - y).tanh().square().mean() + (hyper.exp() * weights.square()).sum()

    def outer(weights, hyper):
        return (x[:4] @ weights).square().mean() + hyper.sin().sum()

    result = unrolled_hypergradient(lambda: inner(w, h), lambda: outer(w, h), [w], [h], steps=7, lr=0.1)
    weights, hyper = w, h.clone().requires_grad_()
    for _ in range(7):
        (gradient,) = torch.autograd.grad(inner(weights, hyper), weights, create_graph=True)
        weights = weights - 0.1 * gradient
    (wanted,) = torch.autograd.grad(outer(weights, hyper), hyper)
    assert relative_error(result.gradients[0], wanted) < 1e-12
    assert not h.requires_grad


def test_unrolled_draws_each_step_its_own_dropout_and_retraces_it():
    x, y = torch.randn(8, 4, dtype=torch.float64), torch.arange(8) % 3
    net, h = nn.Sequential(nn.Linear(4, 3, dtype=torch.float64), nn.Dropout(0.5)), torch.zeros((), dtype=torch.float64)

    def inner():
        return h.exp() * F.cross_entropy(net(x), y)

    def outer():
        return net[0](x).square().mean()

    parameters = list(net.parameters())
    torch.manual_seed(4)
    result = unrolled_hypergradient(inner, outer, parameters, [h], steps=3, lr=0.3)
    torch.manual_seed(4)
    hyper, weights = h.clone().requires_grad_(), list(parameters)
    for _ in range(3):
        loss = hyper.exp() * F.cross_entropy(F.dropout(F.linear(x, *weights), 0.5), y)
        weights = [
            w - 0.3 * g for w, g in zip(weights, torch.autograd.grad(loss, weights, create_graph=True), strict=True)
        ]
    (wanted,) = torch.autograd.grad(F.linear(x, *weights).square().mean(), hyper)
    assert relative_error(result.gradients[0], wanted) < 1e-12


def ridge(dtype=torch.float64):
    """w* = (XᵀX/n + dI)⁻¹ Xᵀy/n, so that dL_V/dlog d is known in closed form."""
    x, y = torch.randn(20, 4, dtype=dtype), torch.randn(20, dtype=dtype)
    xv, yv = torch.randn(20, 4, dtype=dtype), torch.randn(20, dtype=dtype)
    log_decay = torch.tensor(-1.0, dtype=dtype)
    gram = x.T @ x / 20 + log_decay.exp() * torch.eye(4, dtype=dtype)
    optimum = torch.linalg.solve(gram, x.T @ y / 20)
    closed_form = -(xv.T @ (xv @ optimum - yv) / 20) @ torch.linalg.solve(gram, log_decay.exp() * optimum)
    w = optimum.clone().requires_grad_()

    def inner():
        return (x @ w - y).square().mean() / 2 + log_decay.exp() * w.square().sum() / 2

    def outer():
        return (xv @ w - yv).square().mean() / 2

    return inner, outer, w, log_decay, closed_form


def test_ridge_has_its_closed_form():
    inner, outer, w, log_decay, closed_form = ridge()
    result = implicit_hypergradient(inner, outer, [w], [log_decay])
    assert relative_error(result.gradients[0], closed_form) < 1e-6  # the default tolerance of the solver
    assert result.status is Status.CONVERGED


def test_direct_and_indirect_terms_have_their_signs():
    """L_T = (w − λ)²/2 and L_V = wλ: w* = λ, and d(λ²)/dλ = 2λ, half of it direct."""
    lam = torch.tensor(3.0, dtype=torch.float64)
    w = torch.tensor([3.0], dtype=torch.float64, requires_grad=True)
    result = implicit_hypergradient(lambda: ((w - lam) ** 2 / 2).sum(), lambda: (w * lam).sum(), [w], [lam])
    assert [t.item() for t in (result.direct[0], result.indirect[0], result.gradients[0])] == pytest.approx([3, 3, 6])


def test_a_hyperparameter_of_the_outer_loss_alone_has_its_direct_term():
    w, lam = torch.ones(1, requires_grad=True), torch.tensor(2.0)
    result = implicit_hypergradient(lambda: w.square().sum(), lambda: (lam * w.square()).sum(), [w], [lam])
    assert result.gradients[0].item() == pytest.approx(1.0)


@pytest.mark.parametrize("exponent", [-10, 0, 10])
def test_scale_of_the_losses_does_not_matter(exponent):
    inner, outer, w, log_decay, closed_form = ridge()
    scale = 10.0**exponent
    result = implicit_hypergradient(lambda: scale * inner(), lambda: outer() / scale, [w], [log_decay])
    assert relative_error(scale * result.gradients[0], closed_form) < 1e-6


def test_odd_parameters_do_not_change_the_hypergradient():
    inner, outer, w, log_decay, closed_form = ridge()
    frozen, unused = torch.randn(3, dtype=torch.float64), torch.randn(2, dtype=torch.float64, requires_grad=True)
    result = implicit_hypergradient(inner, outer, [frozen, w, unused], [log_decay])
    assert relative_error(result.gradients[0], closed_form) < 1e-6
    assert result.solution.x.shape == (9,)


def test_singular_hessian_with_a_consistent_right_hand_side():
    """Two weights of which only the sum matters."""
    w, lam = torch.full((2,), 0.5, dtype=torch.float64, requires_grad=True), torch.tensor(1.0, dtype=torch.float64)
    for solver in (ConjugateGradient(), MinimumResidual(), Direct()):
        result = implicit_hypergradient(
            lambda: (w.sum() - lam).square() / 2, lambda: w.sum().square() / 2, [w], [lam], solver=solver
        )
        assert result.gradients[0].item() == pytest.approx(1.0)
        assert result.status.succeeded


def test_nothing_is_left_behind():
    x, y = torch.randn(8, 4, dtype=torch.float64), torch.arange(8) % 3
    net, log_decay = Net(dropout=0.0), torch.tensor(-3.0, dtype=torch.float64)
    weights = [p.detach().clone() for p in net.parameters()]

    def inner():
        return F.cross_entropy(net(x), y) + log_decay.exp() * sum(p.square().sum() for p in net.parameters())

    implicit_hypergradient(inner, lambda: F.cross_entropy(net(x), y), list(net.parameters()), [log_decay])
    assert all(torch.equal(p, w) and p.grad is None for p, w in zip(net.parameters(), weights, strict=True))
    assert not log_decay.requires_grad
    assert log_decay.grad is None


def test_flags_are_restored_after_an_exception():
    w, lam = torch.ones(1, requires_grad=True), torch.tensor(2.0)

    def broken():
        raise RuntimeError("user error")

    with pytest.raises(RuntimeError, match="user error"):
        implicit_hypergradient(broken, lambda: w.sum(), [w], [lam])
    assert not lam.requires_grad


@pytest.mark.parametrize("where", ["inner", "outer", "direct"])
def test_nan_ends_in_a_status(where):
    w, lam = torch.ones(2, requires_grad=True), torch.tensor(1.0)
    bad = {name: torch.nan if name == where else 1.0 for name in ("inner", "outer", "direct")}
    result = implicit_hypergradient(
        lambda: (bad["inner"] * lam * w.square()).sum(),
        lambda: (bad["outer"] * w.square()).sum() + bad["direct"] * lam,
        [w],
        [lam],
    )
    assert result.status is Status.NONFINITE
    assert "NaN" in result.diagnosis


def test_warm_start_and_solver_are_used():
    inner, outer, w, log_decay, closed_form = ridge()
    exact = implicit_hypergradient(inner, outer, [w], [log_decay], solver=Direct()).solution.x
    warm = implicit_hypergradient(inner, outer, [w], [log_decay], solver=ConjugateGradient(rtol=1e-6), x0=exact)
    assert warm.products == 1
    rough = implicit_hypergradient(inner, outer, [w], [log_decay], solver=Identity(scale=1e-3))
    assert relative_error(rough.gradients[0], closed_form) > 0.9


def test_an_unused_hyperparameter_is_an_error_that_says_what_to_do():
    w, lam, lr = torch.ones(1, requires_grad=True), torch.tensor(1.0), torch.tensor([0.1, 0.2])
    losses = (lambda: (lam * w.square()).sum(), lambda: w.sum(), [w], [lam, lr])
    with pytest.raises(ValueError, match=r"hyperparameter 1, of shape \(2,\), does not influence.*ExactGeN or a sweep"):
        implicit_hypergradient(*losses)
    result = implicit_hypergradient(*losses, allow_unused=True)
    assert result.unused == (1,)
    assert result.gradients[1].tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"hyperparameters": [torch.tensor(3)]}, TypeError, "hyperparameter 0: expected a real floating-point"),
        ({"hyperparameters": [torch.tensor(1j)]}, TypeError, "got torch.complex64"),
        ({"curvature": "fisher"}, ValueError, "expected curvature to be one of"),
        (
            {"outer_loss": lambda: torch.ones(2, requires_grad=True) * 2},
            ValueError,
            r"the outer loss: expected a scalar",
        ),
        ({"outer_loss": lambda: torch.tensor(1.0)}, ValueError, "the outer loss is detached"),
        ({"parameters": []}, ValueError, "at least one tensor"),
    ],
)
def test_refuses(options, error, message):
    w, lam = torch.ones(1, requires_grad=True), torch.tensor(1.0)
    arguments = {
        "inner_loss": lambda: (lam * w.square()).sum(),
        "outer_loss": lambda: w.sum(),
        "parameters": [w],
        "hyperparameters": [lam],
    }
    with pytest.raises(error, match=message):
        implicit_hypergradient(**(arguments | options))


@pytest.mark.parametrize(
    ("steps", "lr", "message"), [(0, 0.1, "steps"), (1, 0.0, "lr > 0"), (1, float("nan"), "lr > 0")]
)
def test_unrolled_refuses(steps, lr, message):
    w = torch.ones(1, requires_grad=True)
    with pytest.raises(ValueError, match=message):
        unrolled_hypergradient(lambda: w.sum(), lambda: w.sum(), [w], [torch.tensor(1.0)], steps=steps, lr=lr)


@pytest.mark.parametrize("reference", ["direct", "finite_difference"])
def test_check_passes_what_is_right_and_shows_what_is_wrong(reference):
    inner, outer, w, log_decay, _ = ridge()
    assert check_hypergradient(inner, outer, [w], [log_decay], reference=reference, rtol=1e-5)
    with pytest.raises(HypergradientMismatchError, match=r"(?s)more than rtol = 0.001.*got: .*expected: "):
        check_hypergradient(inner, outer, [w], [log_decay], reference=reference, solver=Identity())
    assert torch.equal(w, w.detach())
    with pytest.raises(ValueError, match="reference"):
        check_hypergradient(inner, outer, [w], [log_decay], reference="autograd")


def test_check_by_finite_differences_is_independent_of_the_hessian(digits):
    log_decay = torch.full((), -4.0, dtype=torch.float64)
    w = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    x, y = digits.training[0][:40, 20:23], (digits.training[1][:40] % 2).double()

    def inner():
        return F.binary_cross_entropy_with_logits(x @ w, y) + log_decay.exp() * w.square().sum() / 2

    from lightning_ifthpo.core.space import ParameterSpace
    from lightning_ifthpo.hypergradients.check import _minimize

    _minimize(inner, ParameterSpace([w]))
    assert check_hypergradient(inner, lambda: (x @ w).square().mean(), [w], [log_decay], reference="finite_difference")


def test_check_says_when_the_inner_problem_has_no_minimum():
    w, lam = torch.ones(1, dtype=torch.float64, requires_grad=True), torch.tensor(1.0, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="Newton's method did not solve"):
        check_hypergradient(lambda: (lam * w.exp()).sum(), lambda: w.sum(), [w], [lam], reference="finite_difference")


OPTIMIZERS = {
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.05, betas=(0.8, 0.9)),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.05, amsgrad=True, weight_decay=0.1),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.02, momentum=0.5, centered=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_unrolling_an_optimizer_equals_the_differences_of_runs_made_anew(name):
    """With whatever it keeps, from the middle of a run, which is left as it was."""
    inner, outer, w, log_decay, _ = ridge()
    with torch.no_grad():
        w.add_(torch.linspace(-1, 1, w.numel(), dtype=w.dtype).view_as(w))
    optimizer = OPTIMIZERS[name]([w])

    def train(steps):
        for _ in range(steps):
            optimizer.zero_grad()
            inner().backward()
            optimizer.step()

    train(3)
    start, state = w.detach().clone(), copy.deepcopy(optimizer.state_dict())
    result = unrolled_hypergradient(inner, outer, [w], [log_decay], steps=4, optimizer=optimizer)
    assert torch.equal(w.detach(), start)
    for before, after in zip(state["state"][0].values(), optimizer.state_dict()["state"][0].values(), strict=True):
        assert torch.equal(torch.as_tensor(before), torch.as_tensor(after))
    ends = []
    for sign in (1, -1):
        with torch.no_grad():
            w.copy_(start)
            log_decay.add_(sign * 1e-5)
        optimizer.load_state_dict(copy.deepcopy(state))
        train(4)
        ends.append(outer().item())
        with torch.no_grad():
            log_decay.sub_(sign * 1e-5)
    assert result.gradients[0].item() == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-6)


def test_the_series_of_adam_equals_unrolled_adam_at_a_stationary_point():
    """Where the gradient is zero, its square moves the second moment by nothing; β₂ close to one keeps it as it is."""
    inner, outer, w, log_decay, _ = ridge()
    optimizer = torch.optim.Adam([w], lr=0.03, betas=(0.0, 1 - 1e-13))
    moment = torch.linspace(0.5, 2.0, w.numel(), dtype=w.dtype).view_as(w)
    optimizer.state[w] = {
        "step": torch.tensor(1e15), "exp_avg": torch.zeros_like(w), "exp_avg_sq": moment
    }  # fmt: skip
    unrolled = unrolled_hypergradient(inner, outer, [w], [log_decay], steps=8, optimizer=optimizer)
    solver = Neumann(terms=7, step_size="optimizer").with_optimizer(UpdateRule.of([optimizer], [w]))
    series = implicit_hypergradient(inner, outer, [w], [log_decay], solver=solver)
    assert series.gradients[0].item() == pytest.approx(unrolled.gradients[0].item(), rel=1e-9)
    identity = implicit_hypergradient(inner, outer, [w], [log_decay], solver=Neumann(terms=7, step_size=0.03))
    assert series.gradients[0].item() != pytest.approx(identity.gradients[0].item(), rel=1e-2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either lr, for gradient descent, or the optimizer"),
        ({"lr": 0.1, "optimizer": torch.optim.SGD([torch.ones(1, requires_grad=True)])}, "either lr"),
        ({"optimizer": torch.optim.SGD([torch.ones(1, requires_grad=True)])}, "1 of 1 parameters do not belong"),
        ({"optimizer": "LBFGS"}, "LBFGS does not take differentiable=True"),
    ],
)
def test_unrolled_refuses_optimizers(options, message):
    w = torch.ones(1, requires_grad=True)
    if options.get("optimizer") == "LBFGS":
        options = {"optimizer": torch.optim.LBFGS([w])}
    with pytest.raises(ValueError, match=message):
        unrolled_hypergradient(lambda: w.sum(), lambda: w.sum(), [w], [torch.tensor(1.0)], steps=1, **options)


def test_one_step_by_finite_differences_alone_is_the_first_order_method():
    """T1 − T2 without a second graph: five gradients of the inner loss at most, and what one step of training does."""
    inner, outer, w, log_decay, _ = ridge()
    calls = []

    def counted():
        calls.append(1)
        return inner()

    result = implicit_hypergradient(
        counted, outer, [w], [log_decay], curvature="finite_difference", solver=Identity(scale=0.1)
    )
    unrolled = unrolled_hypergradient(inner, outer, [w], [log_decay], steps=1, lr=0.1)
    assert result.gradients[0].item() == pytest.approx(unrolled.gradients[0].item(), rel=1e-6)
    assert len(calls) <= 5


def test_a_linear_hypernetwork_learns_the_jacobian_of_the_best_response():
    """On a quadratic, exactly −H⁻¹ ∂²L/∂w∂λᵀ, and the hypergradient with it."""
    matrix, mixed = spd_matrix(5, 10.0), torch.linspace(-1, 1, 15, dtype=torch.float64).view(5, 3)
    h = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64)
    w = torch.zeros(5, dtype=torch.float64, requires_grad=True)

    def inner():
        return w @ matrix @ w / 2 + w @ mixed @ h

    def outer():
        return (w - 1).square().sum() + h.sum()

    with torch.no_grad():
        w.copy_(-torch.linalg.solve(matrix, mixed @ h))
    before = w.detach().clone()
    response = LinearBestResponse(inner, [w], [h], lr=0.19, generator=torch.Generator().manual_seed(0))
    for _ in range(600):
        response.step()
    assert relative_error(response.jacobian, -torch.linalg.solve(matrix, mixed)) < 1e-6
    exact = implicit_hypergradient(inner, outer, [w], [h], solver=Direct()).gradients[0]
    assert relative_error(response.hypergradient(outer).gradients[0], exact) < 1e-6
    assert torch.equal(w.detach(), before)


def test_a_hypernetwork_perturbs_by_its_scale_and_refuses_none():
    seen = []
    h, w = torch.zeros(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64, requires_grad=True)

    def inner():
        seen.append(h.clone())
        return (w * h).sum() + w.square().sum()

    LinearBestResponse(inner, [w], [h], lr=0.1, scale=0.25, generator=torch.Generator().manual_seed(0)).step()
    wanted = 0.25 * torch.randn(4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(seen[0], wanted)
    assert torch.equal(seen[1], -wanted)
    for options in ({"lr": 0.0}, {"lr": 0.1, "scale": -1.0}):
        with pytest.raises(ValueError, match="lr > 0 and scale > 0"):
            LinearBestResponse(inner, [w], [h], **options)
