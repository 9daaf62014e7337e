"""Slope and curvature along a direction."""

import math

import pytest
import torch
from torch import nn

from lightning_ifthpo import Loss
from lightning_ifthpo.curvature import GaussNewtonOperator
from lightning_ifthpo.step_size import (
    AveragedRule,
    Parabola,
    exact_parabola,
    fitted_parabola,
    three_point_parabola,
)
from tests.helpers.device import DEVICE, FLOAT64, randn
from tests.helpers.problems import quadratic


class OneLayer:
    """ŷ = σ(Wx + b) with half the mean squared norm of the error, and the closed forms of its optimal rate."""

    def __init__(self, examples, slope, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(examples, 4, dtype=torch.float64, generator=generator).to(DEVICE)
        self.y = torch.randn(examples, 3, dtype=torch.float64, generator=generator).to(DEVICE)
        self.weight = torch.randn(3, 4, dtype=torch.float64, generator=generator).to(DEVICE).requires_grad_()
        self.bias = torch.randn(3, dtype=torch.float64, generator=generator).to(DEVICE).requires_grad_()
        self.slope = slope

    @property
    def parameters(self):
        return [self.weight, self.bias]

    def loss(self):
        outputs = nn.functional.leaky_relu(self.x @ self.weight.T + self.bias, self.slope)
        return (outputs - self.y).square().sum() / (2 * len(self.x))

    def gradient(self):
        return torch.autograd.grad(self.loss(), self.parameters)

    def closed_form(self):
        """Numerator Σᵢⱼ (1 + xᵢᵀxⱼ) eᵢᵀΔᵢΔⱼeⱼ / M² and denominator Σᵢ ‖Δᵢ(∇W xᵢ + ∇b)‖² / M."""
        z = self.x @ self.weight.T + self.bias
        derivative = torch.where(z > 0, 1.0, self.slope)
        pulled = derivative * (torch.where(z > 0, z, self.slope * z) - self.y)
        m = len(self.x)
        numerator = ((1 + self.x @ self.x.T) * (pulled @ pulled.T)).sum() / m**2
        slopes = [pulled.T @ self.x / m, pulled.mean(0)]
        denominator = (derivative * (self.x @ slopes[0].T + slopes[1])).square().sum() / m
        return (numerator / denominator).item()


@pytest.mark.parametrize("slope", [0.0, 0.125], ids=["ReLU", "leaky ReLU"])
@pytest.mark.parametrize("examples", [1, 2, 8, 50])
@pytest.mark.parametrize("curvature", ["hessian", "finite_difference"])
def test_the_closed_form_of_a_single_layer(slope, examples, curvature):
    """Inside one linear region the loss is a parabola; differences leave third derivatives, here zero, and rounding."""
    problem = OneLayer(examples, slope)
    model = exact_parabola(problem.loss, problem.parameters, problem.gradient(), curvature=curvature)
    tolerance = 1e-12 if curvature == "hessian" else 1e-7
    assert model.optimal_step == pytest.approx(problem.closed_form(), rel=tolerance)


def test_one_example_has_the_rate_of_its_length():
    """1 / (1 + xᵀx), whatever the weights, when all units are alive."""
    problem = OneLayer(1, slope=1.0)
    model = exact_parabola(problem.loss, problem.parameters, problem.gradient())
    assert model.optimal_step == pytest.approx(1 / (1 + problem.x.square().sum().item()), rel=1e-12)


def test_a_dead_network_is_recognized_and_not_divided():
    problem = OneLayer(4, slope=0.0)
    with torch.no_grad():
        problem.bias.fill_(-100.0)
    model = exact_parabola(problem.loss, problem.parameters, problem.gradient())
    assert (model.slope, model.curvature, model.optimal_step, model.sharpness) == (0.0, 0.0, None, 0.0)


def test_a_loss_without_a_lowest_point_has_no_optimal_step():
    w = torch.tensor([1.0], requires_grad=True, device=DEVICE)
    assert exact_parabola(lambda: -w.square().sum(), [w], [torch.ones(1, device=DEVICE)]).optimal_step is None
    assert exact_parabola(lambda: w.sum(), [w], [torch.ones(1, device=DEVICE)]).optimal_step is None


@pytest.mark.parametrize("steps", [[-0.1, 0.0, 0.1], [-0.2, -0.1, 0.0, 0.1, 0.2], [0.0, 0.05, 0.1, 0.2]], ids=str)
def test_fits_are_exact_on_a_parabola(steps):
    model = fitted_parabola(lambda step: 3.0 - 2.0 * step + 4.0 * step**2 / 2, steps, squared_length=2.0)
    assert (model.slope, model.curvature) == pytest.approx((2.0, 4.0), rel=1e-9)
    assert model.sharpness == pytest.approx(2.0)


def test_a_fit_knows_when_rounding_drowns_the_curvature():
    """In float32 a second difference below four units in the last place of the losses is nothing; in float64 it is."""

    def loss_at(step):
        return 3.0 - 2.0 * step + 4.0 * step**2 / 2

    rough, fine = (
        fitted_parabola(loss_at, [-1e-4, 0.0, 1e-4], dtype=dtype) for dtype in (torch.float32, torch.float64)
    )
    assert (rough.curvature, rough.optimal_step) == (0.0, None)
    assert rough.slope == pytest.approx(2.0, rel=1e-9)
    assert fine.curvature == pytest.approx(4.0, rel=1e-4)


def test_a_fit_needs_three_points_and_finite_losses():
    with pytest.raises(ValueError, match="three different steps"):
        fitted_parabola(abs, [0.1, 0.1, -0.1])
    assert not fitted_parabola(lambda step: math.inf if step > 0 else 1.0, [-0.1, 0.0, 0.1]).is_finite


def test_three_points_are_exact_on_a_parabola_and_leave_no_trace():
    weight, loss = quadratic()
    unused = torch.ones(2, **FLOAT64, requires_grad=True)
    omega = torch.linspace(1, 2, 6, **FLOAT64)
    before, exact = weight.detach().clone(), exact_parabola(loss, [weight], [omega])
    for step in (0.0, 0.3, 5.0):
        model = three_point_parabola(loss, [weight, unused], [omega, None], step=step)
        # a step of zero is lengthened until second differences are worth six digits
        assert (model.slope, model.curvature) == pytest.approx((exact.slope, exact.curvature), rel=1e-6)
        assert model.squared_length == pytest.approx(exact.squared_length)
        assert torch.equal(weight, before)


def test_three_points_lie_at_the_ends_of_the_step():
    """Where the loss is no parabola, that makes a difference: |w| from 1 seen over a step of 2 has curvature 1/2."""
    w = torch.tensor([1.0], **FLOAT64, requires_grad=True)
    assert three_point_parabola(
        lambda: w.abs().sum(), [w], [torch.ones(1, device=DEVICE)], step=2.0
    ).curvature == pytest.approx(0.5)
    assert three_point_parabola(lambda: w.abs().sum(), [w], [torch.ones(1, device=DEVICE)], step=0.5).curvature == 0.0


def test_three_points_lengthen_a_step_that_float32_cannot_resolve():
    """At 1e-6 of the weights the second difference is a thousandth of the rounding error."""
    weight, loss = quadratic(torch.float32)
    exact = exact_parabola(loss, [weight], [torch.ones(6, device=DEVICE)])
    model = three_point_parabola(loss, [weight], [torch.ones(6, device=DEVICE)], step=1e-6)
    assert (model.slope, model.curvature) == pytest.approx((exact.slope, exact.curvature), rel=0.05)


@pytest.mark.parametrize(
    ("last", "evaluations"),
    [
        (None, 5),
        (Parabola(1.0, 1.0, 6.0), 3),
        (Parabola(1.0, 1e-8, 6e-8), 3),  # the same parabola, seen along a shorter update
        (Parabola(1.0, 1e12, 6.0), 5),  # a curvature that would have shown
        (Parabola(0.0, 0.0, 0.0), 5),
        (Parabola(math.nan, math.nan, 6.0), 5),
    ],
    ids=str,
)
def test_three_points_know_from_the_last_time_that_a_step_drowns(last, evaluations):
    weight, loss = quadratic(torch.float32)
    direction, calls = [torch.ones(6, device=DEVICE)], []

    def counted():
        calls.append(1)
        return loss()

    expected = three_point_parabola(loss, [weight], direction, step=1e-6)
    assert three_point_parabola(counted, [weight], direction, step=1e-6, last=last) == expected
    assert len(calls) == evaluations


def test_three_points_know_the_roughest_dtype():
    """A float64 scale among float32 weights does not make their losses any finer."""
    torch.manual_seed(0)
    net, scale = nn.Linear(4, 3).to(DEVICE), nn.Parameter(torch.ones(3, **FLOAT64))
    x, y = torch.randn(16, 4, device=DEVICE), torch.arange(16, device=DEVICE) % 3
    parameters = [*net.parameters(), scale]

    def loss():
        return nn.functional.cross_entropy(net(x) * scale.float(), y)

    direction = torch.autograd.grad(loss(), parameters)
    exact = exact_parabola(loss, parameters, direction)
    assert three_point_parabola(loss, parameters, direction).curvature == pytest.approx(exact.curvature, rel=0.05)


def test_three_points_without_a_step_look_farther_until_curvature_shows():
    """A constant ten thousand times as large drowns what is seen nearby."""
    w = torch.linspace(-1, 1, 50, requires_grad=True, device=DEVICE)
    model = three_point_parabola(lambda: 100.0 + (w**2).sum() / 50, [w], [torch.ones(50, device=DEVICE) / 50])
    assert model.curvature == pytest.approx(2 / 50**2, rel=0.1)
    assert (
        three_point_parabola(lambda: 100.0 + w.sum() / 50, [w], [torch.ones(50, device=DEVICE) / 50]).curvature == 0.0
    )


def test_three_points_draw_the_same_random_numbers():
    w = torch.ones(1000, requires_grad=True, device=DEVICE)
    torch.manual_seed(0)
    model = three_point_parabola(
        lambda: nn.functional.dropout(w, 0.5).mean(), [w], [torch.ones(1000, device=DEVICE)], step=0.1
    )
    assert model.curvature == 0.0
    assert 0.8 < model.slope < 1.2


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_three_points_along_nothing_or_to_nowhere(value):
    w = torch.ones(2, requires_grad=True, device=DEVICE)
    assert three_point_parabola(lambda: w.sum(), [w], [None]) == Parabola(0.0, 0.0, 0.0)
    assert not three_point_parabola(lambda: w.sum(), [w], [torch.full((2,), value, device=DEVICE)]).is_finite
    assert torch.equal(w.detach(), torch.ones(2, device=DEVICE))


def test_a_failing_loss_leaves_the_weights_where_they_were():
    w = torch.ones(2, requires_grad=True, device=DEVICE)
    with pytest.raises(ZeroDivisionError):
        three_point_parabola(lambda: w.sum() * (1 / 0), [w], [torch.ones(2, device=DEVICE)], step=0.1)
    assert torch.equal(w.detach(), torch.ones(2, device=DEVICE))


class Net(nn.Module):
    """Two layers, a penalty that bypasses the outputs, and a weight that nothing depends on."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.BatchNorm1d(5), nn.Linear(5, 4))
        self.unused = nn.Parameter(torch.ones(2, device=DEVICE))

    def loss(self, activation=torch.clone):
        x, y = torch.linspace(-1, 1, 24, device=DEVICE).view(8, 3).to(**FLOAT64), torch.arange(8, device=DEVICE) % 4
        outputs = activation(self.layers(x))
        return nn.functional.cross_entropy(outputs, y) + self.layers[0].weight.pow(4).sum(), outputs


class Untold(torch.autograd.Function):
    """Has no derivative in forward mode."""

    generate_vmap_rule = False

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient.clone()


@pytest.mark.parametrize("activation", [torch.clone, Untold.apply], ids=["forward mode", "without"])
def test_gauss_newton_along_a_direction_is_that_of_the_operator(activation):
    torch.manual_seed(0)
    net = Net().to(**FLOAT64)
    parameters = list(net.parameters())
    omega = [torch.randn_like(parameter) for parameter in parameters]
    before = [parameter.detach().clone() for parameter in parameters]
    model = exact_parabola(lambda: net.loss(activation), parameters, omega, curvature="gauss_newton")
    operator = GaussNewtonOperator(lambda: net.loss(), parameters)
    flat = torch.cat([part.reshape(-1) for part in omega])
    assert model.slope == pytest.approx((operator.gradient @ flat).item(), rel=1e-10)
    assert model.curvature == pytest.approx(operator.quadratic(flat).item(), rel=1e-10)
    assert all(torch.equal(one, other) for one, other in zip(before, parameters, strict=True))
    with pytest.raises(ValueError, match="mark_outputs"):
        exact_parabola(lambda: net.loss()[0], parameters, omega, curvature="gauss_newton")


def test_gauss_newton_along_a_direction_takes_one_forward_pass_and_no_backward_pass():
    net = Net().to(**FLOAT64)
    calls = {"forward": 0, "backward": 0}

    def count(layer, inputs, output):
        calls["forward"] += 1
        output.grad_fn.register_hook(lambda _, after: calls.update(backward=calls["backward"] + (after[0] is not None)))

    net.layers[0].register_forward_hook(count)
    parameters = list(net.parameters())
    exact_parabola(net.loss, parameters, [torch.ones_like(p) for p in parameters], curvature="gauss_newton")
    assert calls == {"forward": 1, "backward": 0}


def test_units_at_their_kink_are_recognized_and_not_divided():
    """Where all pre-activations are exactly zero, torch takes both derivatives for zero: 0/0."""
    problem = OneLayer(4, slope=0.0)
    with torch.no_grad():
        problem.weight.zero_()
        problem.bias.zero_()
    model = exact_parabola(problem.loss, problem.parameters, problem.gradient())
    assert (model.slope, model.curvature, model.optimal_step) == (0.0, 0.0, None)
    assert not AveragedRule().observe(model)


def test_rounding_is_that_of_the_largest_loss():
    """Here that of the ends, because the loss passes through zero: a second difference of half a unit is nothing."""
    eps = torch.finfo(torch.float32).eps
    assert fitted_parabola(lambda step: step + eps * step**2 / 2, [-1.0, 0.0, 1.0]).curvature == 0.0
    assert fitted_parabola(lambda step: step + 3 * eps * step**2, [-1.0, 0.0, 1.0]).curvature == pytest.approx(6 * eps)


@pytest.mark.parametrize("curvature", ["hessian", "gauss_newton", "finite_difference", "three_point"])
def test_a_share_counts_and_a_loss_scale_does_not(curvature):
    w = torch.tensor([1.0, 2.0], **FLOAT64, requires_grad=True)

    def function():
        z = w**2
        return (z**2).sum() / 2, z

    def parabola(loss):
        if curvature == "three_point":
            return three_point_parabola(loss, [w], [torch.ones(2, **FLOAT64)], step=0.1)
        return exact_parabola(loss, [w], [torch.ones(2, **FLOAT64)], curvature=curvature)

    plain, scaled = parabola(Loss(function, [w])), parabola(Loss(function, [w], share=0.5, scale=8.0))
    assert scaled.slope == pytest.approx(plain.slope / 2, rel=1e-9)
    assert scaled.curvature == pytest.approx(plain.curvature / 2, rel=1e-6)


def test_along_a_direction_whose_square_vanishes_nothing_is_seen():
    w = torch.full((2,), 1e-160, **FLOAT64, requires_grad=True)
    direction = [torch.full((2,), 1e-160, **FLOAT64)]
    assert three_point_parabola(lambda: (w**2).sum(), [w], direction, step=0.1) == Parabola(0.0, 0.0, 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("unit", [1e-8, 1.0, 1e8])
@pytest.mark.parametrize("at", [0.0, 0.5])
def test_without_a_step_three_points_find_one_in_every_unit(at, unit, dtype):
    """Also from weights of zero, which have no unit. With eps^(1/4) the error is about sqrt(eps)."""
    x, y = randn(40, 5, seed=0, dtype=torch.float64), (randn(40, seed=1, dtype=torch.float64) > 0).to(dtype)
    w = torch.full((5,), at / unit, **FLOAT64).to(dtype).requires_grad_()
    loss = lambda: nn.functional.binary_cross_entropy_with_logits((unit * x).to(dtype) @ w, y)  # noqa: E731
    direction = torch.autograd.grad(loss(), [w])
    exact = exact_parabola(loss, [w], direction)
    found = three_point_parabola(loss, [w], direction)
    error = 100 * torch.finfo(dtype).eps ** 0.5  # of three times the best step, with a third derivative of ten
    assert (found.slope, found.curvature) == pytest.approx((exact.slope, exact.curvature), rel=error)


def test_a_short_step_that_is_resolved_is_kept():
    """Of |w|³ from 1: over the step itself, although it is shorter than eps^(1/4) of the weights."""
    w, direction, seen = torch.ones(1, **FLOAT64, requires_grad=True), [torch.ones(1, **FLOAT64)], []
    loss = lambda: (seen.append(w.item()), (w**3).sum())[1]  # noqa: E731
    three_point_parabola(loss, [w], direction, step=1e-5)
    assert len(seen) == 3
    assert max(seen) - 1.0 == pytest.approx(1e-5)
    seen.clear()
    three_point_parabola(loss, [w], direction, step=1e-8)
    assert max(seen) - 1.0 == pytest.approx(torch.finfo(torch.float64).eps ** 0.25)


def test_differences_of_gradients_at_a_step_see_kinks_at_its_scale():
    """|w| from 1 has no curvature nearby, and 1/2 over a step of 2; a step that rounds away is not used."""
    w, direction = torch.ones(1, **FLOAT64, requires_grad=True), [torch.ones(1, **FLOAT64)]
    loss = lambda: w.abs().sum()  # noqa: E731
    assert exact_parabola(loss, [w], direction, curvature="finite_difference").curvature == 0.0
    assert exact_parabola(loss, [w], direction, curvature="finite_difference", step=2.0).curvature == pytest.approx(0.5)
    cube = lambda: (w**3).sum()  # noqa: E731
    found = exact_parabola(cube, [w], direction, curvature="finite_difference", step=1e-14)
    assert found.curvature == pytest.approx(6.0, rel=1e-8)


def test_a_parabola_tells_losses_along_the_update_and_may_begin_elsewhere():
    def loss(step):
        return 3.0 - 2.0 * step + 2.5 * step**2

    parabola = Parabola(slope=2.0, curvature=5.0, squared_length=4.0, loss=3.0)
    for step in (-1.0, 0.0, 0.4, 3.0):
        assert parabola.loss - parabola.gain(step) == pytest.approx(loss(step))
        moved = parabola.at(step)
        assert moved.loss == pytest.approx(loss(step))
        assert moved.slope == pytest.approx(2.0 - 5.0 * step)
        assert moved.loss - moved.gain(0.7) == pytest.approx(loss(step + 0.7))
        assert (moved.curvature, moved.squared_length) == (5.0, 4.0)


def test_along_a_longer_update_steps_are_shorter():
    parabola = Parabola(slope=2.0, curvature=5.0, squared_length=4.0, loss=3.0)
    longer = parabola.along(6.0)  # three times as long
    assert longer.squared_length == 36.0
    assert longer.gain(0.1) == pytest.approx(parabola.gain(0.3))
    assert longer.sharpness == pytest.approx(parabola.sharpness)
    assert longer.optimal_step == pytest.approx(parabola.optimal_step / 3)


@pytest.mark.parametrize("size", [1e-22, 1e-39, 1e-45])
def test_an_update_whose_square_is_zero_has_no_parabola(size):
    """As at the end of a descent to zero in float32: a step of the length of the weights is not a float32 number."""
    weight = torch.ones(2, requires_grad=True, device=DEVICE)
    direction = [torch.full((2,), size, device=DEVICE)]
    assert three_point_parabola(lambda: weight.square().sum(), [weight], direction) == Parabola(0.0, 0.0, 0.0)
