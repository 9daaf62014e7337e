"""The check of hypergradients: what passes, and what is shown."""

import pytest
import torch
import torch.nn.functional as F

from lightning_ifthpo import (
    HypergradientMismatchError,
    check_hypergradient,
)
from lightning_ifthpo.curvature import HessianOperator
from lightning_ifthpo.solvers import (
    Direct,
    Identity,
)
from tests.helpers.device import FLOAT64
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
