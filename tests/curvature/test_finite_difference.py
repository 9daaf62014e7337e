"""Finite differences of gradients: their error, and that they leave no trace."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_ifthpo.core.loss import Loss
from lightning_ifthpo.curvature import FiniteDifferenceOperator, HessianOperator
from tests.helpers.device import DEVICE, FLOAT64, WHERE, randn, within
from tests.helpers.networks import Net, batch
from tests.helpers.problems import relative_error


def test_finite_differences_leave_the_weights_bit_for_bit_and_no_gradient():
    x, y = batch()
    net = Net(dtype=torch.float32, dropout=0.5)
    before = [p.detach().clone() for p in net.parameters()]
    operator = FiniteDifferenceOperator(lambda: F.cross_entropy(net(x.float()), y), list(net.parameters()))
    random_state = torch.get_rng_state()
    for _ in range(10):
        operator.matvec(randn(operator.size, seed=0, dtype=torch.float32))
    assert all(torch.equal(p, b) for p, b in zip(net.parameters(), before, strict=True))
    assert all(p.grad is None for p in net.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)


def test_finite_differences_restore_the_weights_after_an_exception():
    weight = randn(3, seed=1).requires_grad_()
    before, calls = weight.detach().clone(), []

    def loss():
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("in the middle of a product")
        return weight.pow(3).sum()

    operator = FiniteDifferenceOperator(loss, [weight])
    with pytest.raises(RuntimeError, match="in the middle"):
        operator.matvec(torch.ones(3, **WHERE))
    assert torch.equal(weight.detach(), before)


def test_finite_differences_in_float32_are_accurate_to_1e_minus_3():
    x, y = batch()
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(DEVICE)
    parameters = list(net.parameters())

    def loss():
        return F.cross_entropy(net(x.float()), y)

    v = randn(sum(p.numel() for p in parameters), seed=2, dtype=torch.float32)
    exact = HessianOperator(loss, parameters).matvec(v)
    for scale in (1e-10, 1.0, 1e10):
        got = FiniteDifferenceOperator(loss, parameters).matvec(scale * v)
        assert relative_error(got, scale * exact) < 1e-3  # eps^(2/3) = 2.4e-5, times the third derivatives


def test_slope_and_curvature_along_a_direction_come_from_three_gradients():
    """Of w³ at 1 and 2 along (1, 1): ∇L·v = 3 + 12, vᵀHv = 6 + 12."""
    weight, calls = torch.tensor([1.0, 2.0], device=DEVICE, dtype=torch.float64, requires_grad=True), []

    def loss():
        calls.append(1)
        return weight.pow(3).sum()

    slope, curvature = FiniteDifferenceOperator(loss, [weight]).slope_and_curvature(torch.ones_like(weight))
    assert (slope.item(), curvature.item()) == pytest.approx((15.0, 18.0), rel=1e-8)
    assert len(calls) == 3


def test_along_a_zero_vector_nothing_is_evaluated():
    weight = torch.ones(2, requires_grad=True, device=DEVICE)
    operator = FiniteDifferenceOperator(lambda: pytest.fail("evaluated"), [weight])
    assert torch.equal(operator.matvec(torch.zeros(2, device=DEVICE)), torch.zeros(2, device=DEVICE))


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_hyperparameter_that_enters_on_one_side_only_has_a_derivative_of_zero_on_the_other(sign):
    """∂L/∂h is 2 ahead and zero behind, and their difference is taken over 2ε = 2 cbrt(eps)."""
    weight, h = torch.ones(1, **WHERE, requires_grad=True), torch.ones(1, **WHERE, requires_grad=True)
    operator = FiniteDifferenceOperator(lambda: ((weight * h if weight > 1.0 else weight) ** 2).sum(), [weight])
    unused = torch.ones(1, **WHERE, requires_grad=True)
    product, nothing = operator.mixed_product(torch.full((1,), sign, **WHERE), [h, unused])
    width = 2 * torch.finfo(torch.float64).eps ** (1 / 3)
    assert product.item() == pytest.approx(sign * 2 / width, rel=1e-4)  # 2(1 + ε)² with ε = 6e-6
    assert nothing is None


def test_random_numbers_are_those_that_come_next_when_the_operator_is_made():
    """Whatever is asked first, and whatever is drawn in between; none of it advances the generators."""
    weight = torch.ones(20, **WHERE, requires_grad=True)
    loss = lambda: (F.dropout(weight, 0.5) ** 3).sum()  # noqa: E731
    torch.manual_seed(3)
    wanted = loss().item()
    torch.manual_seed(3)
    operator = FiniteDifferenceOperator(loss, [weight])
    state = torch.get_rng_state()
    assert operator.gradient.count_nonzero() < 20
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(5)
    assert operator.loss.item() == wanted


@pytest.mark.parametrize("size", [1e-8, 1e8])
def test_differences_are_as_wide_as_the_weights_ask_for(size):
    """At weights of 1e8 cbrt(eps) is only 400 units in the last place; at 1e-8 the width is cbrt(eps) itself."""
    weight = torch.full((4,), size, device=DEVICE, dtype=torch.float64, requires_grad=True)
    matrix = torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64, device=DEVICE))
    operator = FiniteDifferenceOperator(lambda: weight @ matrix @ weight / 2 + weight.sum(), [weight])
    assert relative_error(operator.to_dense(), matrix) < 1e-8


def logistic(unit, dtype, *, rows=0, scale=1.0, at=0.5):
    """A logistic regression with features in another unit, and rows of weights that it does not use."""
    x, y = unit * randn(40, 5, seed=0, dtype=torch.float64), (randn(40, seed=1, dtype=torch.float64) > 0).to(dtype)
    w = torch.cat([torch.full((5,), at / unit, **FLOAT64), 1e3 * randn(rows, seed=2, dtype=torch.float64)])
    w = w.to(dtype).requires_grad_()
    return w, lambda: scale * F.binary_cross_entropy_with_logits(x.to(dtype) @ w[:5], y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("at", [0.0, 0.5])
@pytest.mark.parametrize(
    "options",
    [{"unit": 1e-8}, {"unit": 1e4}, {"unit": 1e8}, {"scale": 1e-8}, {"scale": 1e8}, {"rows": 20_000}],
    ids=str,
)
def test_units_and_unused_weights_do_not_change_the_error(options, at, dtype):
    """eps^(2/3) is 4e-11 and 2e-5; the third derivatives and the worse of eight directions add a factor of ten."""
    w, loss = logistic(**({"unit": 1.0} | options), dtype=dtype, at=at)
    exact, differences = HessianOperator(loss, [w]), FiniteDifferenceOperator(loss, [w])
    for seed in range(8):
        v = randn(len(w), seed=seed, dtype=dtype)
        assert relative_error(differences.matvec(v), exact.matvec(v)) < 10 * torch.finfo(dtype).eps ** (2 / 3)


def test_tensors_in_units_a_million_apart_shorten_the_step_for_all_products():
    """The first layer in another unit: a step for the second one would saturate the units of the first."""
    x, y = batch()
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(**FLOAT64)
    with torch.no_grad():
        net[0].weight.div_(1e6)
    parameters, evaluations = list(net.parameters()), []

    def loss():
        evaluations.append(1)
        return F.cross_entropy(net(1e6 * x.double()), y)

    v = randn(sum(p.numel() for p in parameters), seed=0, dtype=torch.float64)
    exact, operator = HessianOperator(loss, parameters).matvec(v), FiniteDifferenceOperator(loss, parameters)
    evaluations.clear()
    assert relative_error(operator.matvec(v), exact) < 1e-6
    assert 3 < len(evaluations) <= 9
    evaluations.clear()
    assert relative_error(operator.matvec(10 * v), 10 * operator.matvec(v)) < 1e-12
    assert len(evaluations) == 4


def test_kinks_shorten_the_step_in_float64_and_are_reported_in_float32():
    """A step of cbrt(eps) crosses kinks of ReLU units: up to 98 times the product came out."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 5)).to(DEVICE)
    x, y = randn(512, 20, seed=0, dtype=torch.float32), torch.arange(512, device=DEVICE) % 5
    parameters = list(net.parameters())

    def loss():
        return F.cross_entropy(net(x.to(parameters[0].dtype)), y)

    v = randn(sum(p.numel() for p in parameters), seed=1, dtype=torch.float32)
    operator = FiniteDifferenceOperator(loss, parameters)
    with pytest.warns(UserWarning, match=r"finite differences in torch.float32 are not reliable here: .* Use float64"):
        operator.matvec(v)
    operator.matvec(v)  # it says so once
    net.double()
    v = torch.cat([slope.reshape(-1) for slope in torch.autograd.grad(loss(), parameters)])
    exact = HessianOperator(loss, parameters).matvec(v)
    assert relative_error(FiniteDifferenceOperator(loss, parameters).matvec(v), exact) < 1e-6


def test_a_linear_loss_has_no_curvature_and_no_warning():
    weight = randn(6, seed=0).requires_grad_()
    operator = FiniteDifferenceOperator(lambda: (weight * torch.arange(6, **WHERE)).sum(), [weight])
    assert operator.matvec(randn(6, seed=1)).abs().max() < within(1e-8, power=2 / 3)


def test_sparse_gradients_count_as_dense_ones():
    embedding = nn.Embedding(30, 4, sparse=True, **FLOAT64)
    index, weight = torch.arange(8, device=DEVICE), embedding.weight
    loss = lambda: embedding(index).pow(3).sum()  # noqa: E731
    got = FiniteDifferenceOperator(loss, [weight]).matvec(torch.ones(120, **FLOAT64))
    wanted = torch.zeros(30, 4, **FLOAT64)
    wanted[:8] = 6 * weight.detach()[:8]
    assert relative_error(got, wanted.reshape(-1)) < 1e-8


@pytest.mark.parametrize("first", ["all", "others"])
def test_weights_without_a_gradient_do_not_move(first):
    """torch gives the padding of an embedding no gradient, but the loss depends on it; frozen weights alike."""
    table = torch.nn.Embedding(5, 3, padding_idx=0).double()
    torch.nn.init.normal_(table.weight, generator=torch.Generator().manual_seed(0))
    frozen = torch.ones(3, dtype=torch.float64)
    index = torch.tensor([[0, 1], [2, 0], [3, 3]])

    def loss():
        return (table(index).sum(1) * frozen).tanh().square().sum()

    weights = [table.weight, frozen]
    operator = FiniteDifferenceOperator(loss, weights)
    if first == "others":  # the first product does not show the padding
        operator.matvec(torch.cat([torch.zeros(3), torch.ones(12), torch.zeros(3)]).double())
    dense = operator.to_dense()
    assert torch.allclose(dense, HessianOperator(loss, weights).to_dense(), atol=1e-7)
    assert not dense[:3].any()


def test_the_mixed_product_of_a_verified_loss_does_not_move_weights_that_it_detaches():
    x, first, second = randn(8, 3, seed=1), randn(3, seed=2).requires_grad_(), randn(3, seed=3).requires_grad_()
    h = torch.tensor(0.7, **WHERE, requires_grad=True)

    def loss():
        return h * (x @ first + x @ second.detach()).square().mean()

    v = randn(6, seed=4)
    (wanted,) = HessianOperator(loss, [first, second]).mixed_product(v, [h])
    for verified in (False, True):
        operator = FiniteDifferenceOperator(Loss(loss, [first, second], is_verified=verified), [first, second])
        (got,) = operator.mixed_product(v, [h])
        assert relative_error(got, wanted) < within(1e-7, power=2 / 3)
        assert float(operator.loss) == pytest.approx(loss().item(), rel=within(1e-6, power=0.5))


def test_the_step_of_a_mixed_product_is_as_short_as_an_earlier_batch_has_shown():
    """Where a layer is a million times as small as the others, and moves as far."""
    x = randn(16, 4, seed=1, dtype=torch.float64)
    small, large = 1e-6 * randn(4, 5, seed=2, dtype=torch.float64), randn(5, 1, seed=3, dtype=torch.float64)
    weights = [small.requires_grad_(), large.requires_grad_()]
    h = torch.tensor(0.7, **FLOAT64, requires_grad=True)

    def loss():
        return h * (torch.relu(x @ weights[0]) @ weights[1] - 1.0).square().mean()

    v = torch.cat([g.flatten() for g in torch.autograd.grad(loss(), weights)]).sign()
    (wanted,) = HessianOperator(loss, weights).mixed_product(v, [h])
    first = FiniteDifferenceOperator(loss, weights)
    first.mixed_product(v, [h])
    assert first.factor < 1.0
    errors = []
    for factor in (1.0, first.factor):
        later = Loss(loss, weights, is_verified=True, difference_factor=factor)
        (got,) = FiniteDifferenceOperator(later, weights).mixed_product(v, [h])
        errors.append(relative_error(got, wanted))
    assert errors[1] < 0.1 * errors[0]
