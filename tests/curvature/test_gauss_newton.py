"""Gauss–Newton against its dense definition."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from lightning_ifthpo.core.loss import Loss
from lightning_ifthpo.curvature import (
    GaussNewtonOperator,
    HessianOperator,
    mark_outputs,
)
from lightning_ifthpo.curvature.gauss_newton import forward_slope_and_curvature
from lightning_ifthpo.curvature.verification import check_complete, verified_operator
from tests.helpers.device import DEVICE, WHERE, randn, within
from tests.helpers.networks import Net, batch, functional
from tests.helpers.problems import relative_error


def reference_gauss_newton(net, x, y, penalty):
    """[Jᵀ I] ∇²L(z, w) [Jᵀ I]ᵀ from dense Jacobians."""
    function, flat = functional(net, lambda model, _: model(x).reshape(-1))
    z = function(flat)
    jacobian = torch.func.jacrev(function)(flat)
    extended = torch.cat([jacobian, torch.eye(flat.numel(), **WHERE)])

    def loss(joined):
        outputs, weights = joined[: z.numel()], joined[z.numel() :]
        return F.cross_entropy(outputs.view(len(x), -1), y) + penalty(outputs, weights)

    curvature = torch.func.hessian(loss)(torch.cat([z, flat]))
    return extended.T @ curvature @ extended


PENALTIES = {
    "none": lambda z, w: 0.0 * w.sum(),
    "decay": lambda z, w: 0.1 * w.square().sum(),
    "quartic": lambda z, w: 0.1 * (w**4).sum(),
    "coupled to the outputs": lambda z, w: 0.1 * w.square().sum() * z.square().mean(),
}


@pytest.mark.parametrize("marking", ["marked", "returned", "both"])
@pytest.mark.parametrize("name", PENALTIES)
def test_gauss_newton_equals_its_dense_definition(name, marking):
    """The penalty's Hessian is added exactly, whether outputs are marked or returned."""
    x, y = batch()
    net, penalty = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(**WHERE), PENALTIES[name]

    def loss():
        z = net(x)
        z = z if marking == "returned" else mark_outputs(z)
        flat = torch.cat([p.reshape(-1) for p in net.parameters()])
        value = F.cross_entropy(z, y) + penalty(z.reshape(-1), flat)
        return value if marking == "marked" else (value, z)

    operator = GaussNewtonOperator(loss, list(net.parameters()))
    assert relative_error(operator.to_dense(), reference_gauss_newton(net, x, y, penalty)) < within(1e-12)


def test_gauss_newton_with_several_outputs():
    x, y = batch()
    net = nn.Linear(4, 6).to(**WHERE)

    def loss():
        first, second = net(x).split(3, dim=1)  # both come from one node of the graph
        return F.cross_entropy(mark_outputs(first), y) + mark_outputs(second).square().mean()

    hessian = HessianOperator(loss, list(net.parameters())).to_dense()
    assert relative_error(GaussNewtonOperator(loss, list(net.parameters())).to_dense(), hessian) < within(1e-12)


@pytest.mark.parametrize(
    "combine",
    [
        lambda first, second: first + second,
        lambda first, second: first - second,
        lambda first, second: first * second.detach() + 0.0 * second,
        lambda first, second: first - 3.0 * second,
    ],
    ids=["sum", "difference", "product", "one from the other"],
)
def test_gauss_newton_with_outputs_whose_slopes_hang_together(combine):
    weights = [
        torch.tensor([1.0, 2.0], requires_grad=True, device=DEVICE),
        torch.tensor([3.0, 1.0], requires_grad=True, device=DEVICE),
    ]

    def loss():
        first, second = mark_outputs(2.0 * weights[0]), mark_outputs(3.0 * weights[1])
        return combine(first, second).square().sum()

    hessian = HessianOperator(loss, weights)
    operator = GaussNewtonOperator(loss, weights)
    assert torch.equal(operator.to_dense(), hessian.to_dense())  # the model is linear
    assert torch.equal(operator.gradient, hessian.gradient)


def test_gauss_newton_with_an_output_of_hyperparameters_alone():
    weight, target = (
        torch.tensor([1.0, 2.0], requires_grad=True, device=DEVICE),
        torch.tensor([3.0], requires_grad=True, device=DEVICE),
    )

    def loss():
        return (mark_outputs(2.0 * weight) - mark_outputs(2.0 * target)).square().sum()

    operator = GaussNewtonOperator(loss, [weight])
    assert torch.equal(operator.to_dense(), torch.diag(torch.tensor([8.0, 8.0], device=DEVICE)))
    (mixed,) = operator.mixed_product(torch.ones(2, device=DEVICE), [target])
    assert float(mixed) == -16.0


def test_gauss_newton_is_positive_semidefinite_where_the_hessian_is_not():
    x, y = batch()
    net = Net(dropout=0.0)

    def loss():
        return F.cross_entropy(mark_outputs(net(x)), y)

    parameters = list(net.parameters())
    gauss_newton = torch.linalg.eigvalsh(GaussNewtonOperator(loss, parameters).to_dense())
    hessian = torch.linalg.eigvalsh(HessianOperator(loss, parameters).to_dense())
    assert gauss_newton[0] > -within(1e-14)
    assert hessian[0] < -1e-3


@pytest.mark.parametrize("name", PENALTIES)
def test_slope_and_curvature_in_forward_mode_are_those_of_the_dense_matrix(name):
    """With four tensors of weights and two outputs, and with two tensors and three outputs."""
    x, y = batch()
    penalty = PENALTIES[name]
    for net, parts in (
        (nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), [1, 2]),
        (nn.Sequential(nn.Linear(4, 3), nn.Tanh()), [1, 1, 1]),
    ):
        net.to(**WHERE)
        parameters = list(net.parameters())

        def loss(net=net, parts=parts, parameters=parameters):
            z = torch.cat([mark_outputs(part) for part in net(x).split(parts, dim=1)], dim=1)
            flat = torch.cat([p.reshape(-1) for p in parameters])
            return F.cross_entropy(z, y) + penalty(z.reshape(-1), flat)

        v = randn(sum(p.numel() for p in parameters), seed=3)
        slope, curvature = forward_slope_and_curvature(Loss(loss, parameters), v)
        gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss(), parameters)])
        dense = reference_gauss_newton(net, x, y, penalty)
        assert slope.item() == pytest.approx(float(gradient @ v), rel=within(1e-12))
        assert curvature.item() == pytest.approx(float(v @ dense @ v), rel=within(1e-12))


class Tuned:
    """Softmax regression behind a hidden layer, with a hyperparameter in one place."""

    def __init__(self, place):
        self.x, self.y = batch()
        self.net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(**WHERE)
        self.weights, self.place = list(self.net.parameters()), place
        self.hyperparameter = torch.linspace(0.5, 1.5, 8, **WHERE, requires_grad=True)

    def __call__(self):
        h, place = self.hyperparameter, self.place
        x = self.x * h[:, None] if place in ("the data", "the data and the loss") else self.x
        z = mark_outputs(self.net(x))
        losses = F.cross_entropy(z, self.y, reduction="none")
        if place in ("the loss", "the data and the loss"):
            losses = losses * h
        if place == "the scale of the outputs":
            losses = F.cross_entropy(z * h[0], self.y, reduction="none") * h[1]
        loss = losses.mean()
        if place == "a decay":
            loss = loss + h[0] * sum(w.square().sum() for w in self.weights) + h[1] * z.square().mean()
        return loss


BEHIND = ["the loss", "the scale of the outputs", "a decay"]
PLACES = [*BEHIND, "the data", "the data and the loss"]


@pytest.mark.parametrize("place", PLACES)
def test_the_mixed_product_is_exact_wherever_the_hyperparameter_enters(place):
    loss = Tuned(place)
    operator = GaussNewtonOperator(loss, loss.weights)
    first, second, other = randn(3, operator.size, seed=4)
    exact = HessianOperator(loss, loss.weights)
    combined = [(2.0, first), (-3.0, second)]
    for v, parts in ((other, ()), (2.0 * first - 3.0 * second, combined), (other, ()), (first, [(1.0, first)])):
        for vector in (first, second):
            operator.matvec(vector)
        (got,) = operator.mixed_product(v, [loss.hyperparameter], parts)
        (wanted,) = exact.mixed_product(v, [loss.hyperparameter])
        assert relative_error(got, wanted) < within(1e-12)


@pytest.mark.parametrize("place", BEHIND)
def test_the_mixed_product_of_a_sum_of_known_vectors_does_not_touch_the_model(place):
    loss = Tuned(place)
    operator = GaussNewtonOperator(Loss(loss, loss.weights, is_verified=True), loss.weights)
    first, second = randn(2, operator.size, seed=4)
    for vector in (first, second):
        operator.matvec(vector)
    with FlopCounterMode(display=False) as known:
        operator.mixed_product(first + second, [loss.hyperparameter], [(1.0, first), (1.0, second)])
    with FlopCounterMode(display=False) as unknown:
        operator.mixed_product(first + second, [loss.hyperparameter])
    assert known.get_total_flops() == 0  # matrix products
    assert unknown.get_total_flops() > 0


def test_a_vector_that_has_changed_since_its_product_is_not_taken_for_known():
    loss = Tuned("the loss")
    operator = GaussNewtonOperator(loss, loss.weights)
    v = randn(operator.size, seed=4)
    operator.matvec(v)
    v.mul_(2.0)
    (got,) = operator.mixed_product(v, [loss.hyperparameter], [(1.0, v)])
    (wanted,) = HessianOperator(loss, loss.weights).mixed_product(v, [loss.hyperparameter])
    assert relative_error(got, wanted) < within(1e-12)


def test_a_verified_loss_is_evaluated_when_it_is_needed():
    """A hypergradient without products needs the derivative along one direction alone."""
    loss = Tuned("the loss")
    with FlopCounterMode(display=False) as counter:
        operator = GaussNewtonOperator(Loss(loss, loss.weights, is_verified=True), loss.weights)
    assert counter.get_total_flops() == 0
    operator.matvec(torch.ones(operator.size, **WHERE))


class Convolutions(nn.Module):
    """A convolution and BatchNorm, whose buffers move."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3))
        self.to(**WHERE)

    def forward(self, x):
        return self.net(x)


def convolutions():
    torch.manual_seed(0)
    net, x = Convolutions(), randn(8, 1, 4, 4, seed=2)
    weights, decay = list(net.parameters()), torch.tensor(0.1, **WHERE, requires_grad=True)

    def loss():
        z = mark_outputs(net(x))
        return F.cross_entropy(z, torch.arange(8, device=DEVICE) % 3) + decay * z.square().mean()

    return loss, weights, decay


@pytest.mark.parametrize("first", ["product", "mixed product", "gradient"])
def test_forward_mode_gives_the_same_products(first):
    """Whichever is asked for first, because it evaluates the loss."""
    loss, weights, decay = convolutions()
    reverse = GaussNewtonOperator(loss, weights)
    forward = GaussNewtonOperator(Loss(loss, weights, is_verified=True, forward_mode=True), weights)
    u, v = randn(2, reverse.size, seed=4)
    asked = {
        "product": lambda operator: operator.matvec(u),
        "mixed product": lambda operator: operator.mixed_product(u, [decay])[0],
        "gradient": lambda operator: operator.gradient,
    }
    for name in (first, *asked):
        assert relative_error(asked[name](forward), asked[name](reverse)) < within(1e-12), name
    assert relative_error(forward.matvec(v), reverse.matvec(v)) < within(1e-12)
    assert all(torch.equal(weight, before) for weight, before in zip(weights, convolutions()[1], strict=True))


def test_forward_mode_is_for_convolutions_whose_derivatives_it_knows():
    def gains(model):
        loss = Loss(lambda: mark_outputs(model(x)).square().mean(), list(model.parameters()))
        structure = check_complete(loss)
        operator, _ = verified_operator("gauss_newton", loss, replace(structure, custom=()))
        return operator.uses_forward_mode

    x = randn(8, 1, 4, 4, seed=2)
    assert gains(Convolutions())
    assert not gains(nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).to(**WHERE))  # nothing to gain
    assert not gains(nn.Sequential(Convolutions(), Scaled()).to(**WHERE))  # another derivative
    assert not gains(nn.Sequential(Convolutions(), Opaque()).to(**WHERE))  # no derivative
    assert not gains(Checkpointed().to(**WHERE))  # another number of tensors when it is repeated


class Scaled(nn.Module):
    """Divides by a length that is computed without gradients, in forward mode with them."""

    def forward(self, z):
        with torch.no_grad():
            length = z.norm()
        return z / length


class Checkpointed(Convolutions):
    def forward(self, x):
        return checkpoint(self.net, x, use_reentrant=False)


class Opaque(nn.Module):
    """Uses a function without a derivative in forward mode."""

    def forward(self, z):
        return Double.apply(z)


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z):
        return 2.0 * z

    @staticmethod
    def backward(ctx, gradient):
        return 2.0 * gradient


def test_the_mixed_product_is_exact_for_a_hyperparameter_that_is_no_leaf():
    """It is the result of an operation outside of the loss, and enters before the model."""
    x, _ = batch()
    net = nn.Linear(4, 3).to(**WHERE)
    weights, hyperparameter = list(net.parameters()), torch.ones(8, 1, **WHERE, requires_grad=True).exp()

    def loss():
        return mark_outputs(net(x * hyperparameter)).square().mean()

    v = randn(sum(w.numel() for w in weights), seed=3)
    (got,) = GaussNewtonOperator(loss, weights).mixed_product(v, [hyperparameter])
    (wanted,) = HessianOperator(loss, weights).mixed_product(v, [hyperparameter])
    assert relative_error(got, wanted) < within(1e-12)
