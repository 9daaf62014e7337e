"""Slope, curvature and the rate made of them."""

import math

import pytest
import torch
from torch import nn

from lightning_ifthpo.curvature import GaussNewtonOperator
from lightning_ifthpo.step_size import (
    AveragedRule,
    Parabola,
    ExactGeNLR,
    PublishedRule,
    check_linear_in_lr,
    exact_parabola,
    fitted_parabola,
    three_point_parabola,
)
from tests.problems import relative_error, spd_matrix


class OneLayer:
    """ŷ = σ(Wx + b) with half the mean squared norm of the error, and the closed forms of its optimal rate."""

    def __init__(self, examples, slope, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(examples, 4, dtype=torch.float64, generator=generator)
        self.y = torch.randn(examples, 3, dtype=torch.float64, generator=generator)
        self.weight = torch.randn(3, 4, dtype=torch.float64, generator=generator).requires_grad_()
        self.bias = torch.randn(3, dtype=torch.float64, generator=generator).requires_grad_()
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
    w = torch.tensor([1.0], requires_grad=True)
    assert exact_parabola(lambda: -w.square().sum(), [w], [torch.ones(1)]).optimal_step is None
    assert exact_parabola(lambda: w.sum(), [w], [torch.ones(1)]).optimal_step is None


@pytest.mark.parametrize("steps", [[-0.1, 0.0, 0.1], [-0.2, -0.1, 0.0, 0.1, 0.2], [0.0, 0.05, 0.1, 0.2]], ids=str)
def test_fits_are_exact_on_a_parabola(steps):
    model = fitted_parabola(lambda step: 3.0 - 2.0 * step + 4.0 * step**2 / 2, steps, squared_length=2.0)
    assert (model.slope, model.curvature) == pytest.approx((2.0, 4.0), rel=1e-9)
    assert model.sharpness == pytest.approx(2.0)


def test_a_fit_knows_when_rounding_drowns_the_curvature():
    """In float32 a second difference below four units in the last place of the losses is nothing; in float64 it is."""

    def loss_at(step):
        return 3.0 - 2.0 * step + 4.0 * step**2 / 2

    rough, fine = (fitted_parabola(loss_at, [-1e-4, 0.0, 1e-4], dtype=dtype) for dtype in (torch.float32, torch.float64))
    assert (rough.curvature, rough.optimal_step) == (0.0, None)
    assert rough.slope == pytest.approx(2.0, rel=1e-9)
    assert fine.curvature == pytest.approx(4.0, rel=1e-4)


def test_a_fit_needs_three_points_and_finite_losses():
    with pytest.raises(ValueError, match="three different steps"):
        fitted_parabola(abs, [0.1, 0.1, -0.1])
    assert not fitted_parabola(lambda step: math.inf if step > 0 else 1.0, [-0.1, 0.0, 0.1]).is_finite


def test_three_points_are_exact_on_a_parabola_and_leave_no_trace():
    weight, loss = quadratic()
    unused = torch.ones(2, dtype=torch.float64, requires_grad=True)
    omega = torch.linspace(1, 2, 6, dtype=torch.float64)
    before, exact = weight.detach().clone(), exact_parabola(loss, [weight], [omega])
    for step in (0.0, 0.3, 5.0):
        model = three_point_parabola(loss, [weight, unused], [omega, None], step=step)
        # a step of zero is lengthened until second differences are worth six digits
        assert (model.slope, model.curvature) == pytest.approx((exact.slope, exact.curvature), rel=1e-6)
        assert model.squared_length == pytest.approx(exact.squared_length)
        assert torch.equal(weight, before)


def test_three_points_lie_at_the_ends_of_the_step():
    """Where the loss is no parabola, that makes a difference: |w| from 1 seen over a step of 2 has curvature 1/2."""
    w = torch.tensor([1.0], dtype=torch.float64, requires_grad=True)
    assert three_point_parabola(lambda: w.abs().sum(), [w], [torch.ones(1)], step=2.0).curvature == pytest.approx(0.5)
    assert three_point_parabola(lambda: w.abs().sum(), [w], [torch.ones(1)], step=0.5).curvature == 0.0


def test_three_points_lengthen_a_step_that_float32_cannot_resolve():
    """At 1e-6 of the weights the second difference is a thousandth of the rounding error."""
    weight, loss = quadratic(torch.float32)
    exact = exact_parabola(loss, [weight], [torch.ones(6)])
    model = three_point_parabola(loss, [weight], [torch.ones(6)], step=1e-6)
    assert (model.slope, model.curvature) == pytest.approx((exact.slope, exact.curvature), rel=0.05)


def test_three_points_know_the_roughest_dtype():
    """A float64 scale among float32 weights does not make their losses any finer."""
    torch.manual_seed(0)
    net, scale = nn.Linear(4, 3), nn.Parameter(torch.ones(3, dtype=torch.float64))
    x, y = torch.randn(16, 4), torch.arange(16) % 3
    parameters = [*net.parameters(), scale]

    def loss():
        return nn.functional.cross_entropy(net(x) * scale.float(), y)

    direction = torch.autograd.grad(loss(), parameters)
    exact = exact_parabola(loss, parameters, direction)
    assert three_point_parabola(loss, parameters, direction).curvature == pytest.approx(exact.curvature, rel=0.05)


def test_three_points_without_a_step_look_farther_until_curvature_shows():
    """A constant ten thousand times as large drowns what is seen nearby."""
    w = torch.linspace(-1, 1, 50, requires_grad=True)
    model = three_point_parabola(lambda: 100.0 + (w**2).sum() / 50, [w], [torch.ones(50) / 50])
    assert model.curvature == pytest.approx(2 / 50**2, rel=0.1)
    assert three_point_parabola(lambda: 100.0 + w.sum() / 50, [w], [torch.ones(50) / 50]).curvature == 0.0


def test_three_points_draw_the_same_random_numbers():
    w = torch.ones(1000, requires_grad=True)
    torch.manual_seed(0)
    model = three_point_parabola(lambda: nn.functional.dropout(w, 0.5).mean(), [w], [torch.ones(1000)], step=0.1)
    assert model.curvature == 0.0
    assert 0.8 < model.slope < 1.2


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_three_points_along_nothing_or_to_nowhere(value):
    w = torch.ones(2, requires_grad=True)
    assert three_point_parabola(lambda: w.sum(), [w], [None]) == Parabola(0.0, 0.0, 0.0)
    assert not three_point_parabola(lambda: w.sum(), [w], [torch.full((2,), value)]).is_finite
    assert torch.equal(w.detach(), torch.ones(2))


def test_a_failing_loss_leaves_the_weights_where_they_were():
    w = torch.ones(2, requires_grad=True)
    with pytest.raises(ZeroDivisionError):
        three_point_parabola(lambda: w.sum() * (1 / 0), [w], [torch.ones(2)], step=0.1)
    assert torch.equal(w.detach(), torch.ones(2))


class Net(nn.Module):
    """Two layers, a penalty beside the outputs and a weight that nothing depends on."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.BatchNorm1d(5), nn.Linear(5, 4))
        self.unused = nn.Parameter(torch.ones(2))

    def loss(self, activation=torch.clone):
        x, y = torch.linspace(-1, 1, 24).view(8, 3).double(), torch.arange(8) % 4
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
    net = Net().double()
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
    net = Net().double()
    calls = {"forward": 0, "backward": 0}

    def count(layer, inputs, output):
        calls["forward"] += 1
        output.register_hook(lambda gradient: calls.update(backward=calls["backward"] + (gradient is not None)))

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


def feed(rule, slope, curvature, count, *, noise=0.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        wobble = noise * torch.randn((), generator=generator).item()
        rule.observe(Parabola(slope(rule.lr or 0.0) + wobble, curvature, 1.0))
    return rule.lr


def test_the_averaged_rule_climbs_to_the_optimal_step_and_rests_there():
    rule = AveragedRule()
    assert feed(rule, lambda _: 2.0, 4.0, 3) == pytest.approx(0.003 * 0.5)
    assert feed(rule, lambda _: 2.0, 4.0, 1) == pytest.approx(0.003 * 0.5 * 1.08**0.997)
    assert not rule.settled
    assert feed(rule, lambda _: 2.0, 4.0, 200) == pytest.approx(0.5, rel=5e-2)
    assert rule.settled


@pytest.mark.parametrize("seed", range(3))
def test_the_averaged_rule_rests_in_the_stationary_state_of_noisy_descent(seed):
    """There slope / curvature is half the rate, whatever the rate: a rule that follows it would be gone long ago."""
    rule = AveragedRule()
    feed(rule, lambda _: 2.0, 4.0, 200)
    before = rule.lr
    rates = [feed(rule, lambda lr: lr * 4.0 / 2, 4.0, 1, noise=1.0, seed=seed * 10_000 + i) for i in range(3000)]
    assert max(rates) < 1.25 * before
    assert min(rates) > before / 4
    assert sum(rates) / len(rates) > 0.6 * before


def test_the_averaged_rule_shrinks_when_steps_make_the_loss_worse():
    rule = AveragedRule()
    feed(rule, lambda _: 2.0, 4.0, 200)
    # down to twice the optimal step, where the gain is zero, and back and forth about it by one recovery or shrinkage
    assert 2.0 / 400.0 < feed(rule, lambda _: 2.0, 400.0, 200) < 1.25 * 2 * 2.0 / 400.0


def test_where_the_loss_curves_downwards_the_rate_grows_as_if_it_were_straight():
    rule = AveragedRule()
    assert feed(rule, lambda _: 2.0, -4.0, 13) == pytest.approx(0.003 * 0.5 * 1.08**10)


@pytest.mark.parametrize("rule_type", [AveragedRule, PublishedRule])
def test_rates_stay_within_bounds_and_bad_probes_change_nothing(rule_type):
    rule = rule_type(lr_min=1e-3, lr_max=1e-2)
    assert feed(rule, lambda _: 1.0, 1e-6, 300) == pytest.approx(1e-2)
    before = rule.lr
    for model in (Parabola(math.nan, 1.0, 1.0), Parabola(1.0, math.inf, 1.0)):
        assert not rule.observe(model)
    assert rule.lr == before
    assert rule.refused == 2
    assert feed(rule, lambda _: 1.0, 1e9, 300) == pytest.approx(1e-3)


def test_a_loss_without_curvature_grows_the_rate_slowly():
    rule = AveragedRule()
    assert feed(rule, lambda _: 1.0, 0.0, 13) == pytest.approx(1e-8 * 1.08**10)


def test_only_the_first_probe_decides_how_high_a_run_begins():
    rule = AveragedRule()
    assert feed(rule, lambda _: 1.0, 0.0, 1) == 1e-8
    assert feed(rule, lambda _: 1.0, 1e-6, 2) == pytest.approx(1e-8 * 1.08**2)
    rule = AveragedRule()
    feed(rule, lambda _: 1.0, 1.0, 1)
    assert feed(rule, lambda _: 1.0, 10.0, 1) == pytest.approx(0.0003)


def test_a_rate_that_hardly_grows_any_more_is_settled():
    """Without noise the slope at the end of a step never vanishes."""
    rule = AveragedRule()
    while not rule.settled:
        feed(rule, lambda _: 2.0, 4.0, 1)
    assert 0.4 < rule.lr < 0.5


def test_the_rate_does_not_collapse_where_a_shorter_step_is_no_better():
    """As with few batches in a fixed order, whose next slope is negative whatever the rate."""
    rule = AveragedRule()
    while not rule.settled:
        feed(rule, lambda _: 2.0, 4.0, 1)
    before = rule.lr
    assert feed(rule, lambda _: -1.5, 4.0, 400) == pytest.approx(before / 4, rel=0.25)
    assert feed(rule, lambda _: -0.01, 4.0, 400) < before / 8


def test_a_probe_without_length_is_not_used_and_not_refused():
    rule = AveragedRule()
    assert not rule.observe(Parabola(0.0, 0.0, 0.0))
    assert (rule.lr, rule.refused) == (None, 0)


def test_a_rate_at_its_bound_is_settled():
    rule = AveragedRule(lr_max=1e-3)
    feed(rule, lambda _: 2.0, 0.1, 100)
    assert rule.settled


def test_once_settled_the_rate_grows_slowly_even_where_nothing_curves():
    """As where a network has learned its data by heart: slope and curvature vanish together."""
    rule = AveragedRule()
    while not rule.settled:
        feed(rule, lambda _: 2.0, 4.0, 1)
    feed(rule, lambda _: 2e-6, 0.0, 100)
    before = rule.lr
    assert feed(rule, lambda _: 2e-6, 0.0, 10) == pytest.approx(before * 1.01**10)
    assert rule.settled


def test_the_published_rule_is_a_moving_average():
    rule = PublishedRule(smoothing=0.5)
    assert feed(rule, lambda _: 2.0, 4.0, 1) == pytest.approx(0.5)
    assert feed(rule, lambda _: 4.0, 4.0, 1) == pytest.approx(0.75)
    assert feed(rule, lambda _: 4.0, -4.0, 5) == pytest.approx(0.75)
    assert rule.refused == 5


@pytest.mark.parametrize("rule_type", [AveragedRule, PublishedRule])
def test_rules_go_on_from_their_state(rule_type):
    rule, other = rule_type(), rule_type()
    feed(rule, lambda _: 2.0, 4.0, 20)
    other.load_state_dict(rule.state_dict())
    assert feed(rule, lambda _: 2.0, 4.0, 30) == feed(other, lambda _: 2.0, 4.0, 30)


OPTIMIZERS = {
    "SGD": (torch.optim.SGD, {}),
    "momentum": (torch.optim.SGD, {"momentum": 0.9}),
    "Nesterov": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "Adam": (torch.optim.Adam, {"weight_decay": 0.1}),
    "AdamW": (torch.optim.AdamW, {"weight_decay": 0.1, "amsgrad": True}),
    "NAdam": (torch.optim.NAdam, {}),
    "RMSprop": (torch.optim.RMSprop, {"momentum": 0.5}),
    "Adadelta": (torch.optim.Adadelta, {}),
}


def quadratic(dtype=torch.float64):
    matrix = spd_matrix(6, 20.0).to(dtype)
    weight = nn.Parameter(torch.linspace(-1, 1, 6, dtype=dtype))
    return weight, lambda: weight @ matrix @ weight / 2


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_are_those_that_the_optimizer_makes_at_the_same_rates(name):
    """The rates that the scheduler chose, replayed in a plain loop: the optimizer's state advances once a step."""
    optimizer_type, options = OPTIMIZERS[name]
    weight, loss = quadratic()
    optimizer = optimizer_type([weight], lr=1.0, **options)
    scheduler = ExactGeNLR(optimizer, total_steps=60)
    rates, ends = [], []
    for _ in range(60):
        scheduler.probe(loss)
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        rates.append(optimizer.param_groups[0]["lr"])
        scheduler.step()
        ends.append(weight.detach().clone())
    assert len(set(rates)) > 20

    weight, loss = quadratic()
    optimizer = optimizer_type([weight], lr=1.0, **options)
    for rate, end in zip(rates, ends, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        # an update at rate one is rounded at the size of the update: eps times its length over the rate's
        assert relative_error(weight, end) < 1e-9


def test_groups_keep_the_relation_of_their_rates():
    weights = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))]
    optimizer = torch.optim.SGD([{"params": weights[:1], "lr": 3e-5}, {"params": weights[1:], "lr": 1e-5}])
    scheduler = ExactGeNLR(optimizer)
    for _ in range(20):
        scheduler.probe(lambda: sum(weight.square().sum() for weight in weights))
        optimizer.zero_grad()
        sum(weight.square().sum() for weight in weights).backward()
        optimizer.step()
        scheduler.step()
    first, second = (group["lr"] for group in optimizer.param_groups)
    assert first == pytest.approx(3 * second)
    moved = [1 - weight.detach() for weight in weights]
    assert moved[0][0] > 2 * moved[1][0] > 0


def two_groups(per_group, curvature="three_point", steps=300):
    """Noisy targets; the second group is a hundred times as steep, and both act on each other."""
    generator = torch.Generator().manual_seed(0)
    weights = [nn.Parameter(torch.full((3,), 5.0, dtype=torch.float64)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": [weight], "lr": 1.0} for weight in weights])
    scheduler = ExactGeNLR(optimizer, per_group=per_group, curvature=curvature, final_decay=0.0)
    for _ in range(steps):
        targets = [0.1 * torch.randn(3, generator=generator).double() for _ in weights]

        def loss(targets=targets):
            first, second = (weight - target for weight, target in zip(weights, targets, strict=True))
            return (first.square().sum() + 100 * second.square().sum() + first @ second) / 2

        scheduler.probe(loss)
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        scheduler.step()
    return scheduler, [group["lr"] for group in optimizer.param_groups]


@pytest.mark.parametrize("curvature", ["three_point", "hessian"])
def test_each_group_finds_its_own_rate(curvature):
    scheduler, (first, second) = two_groups(per_group=True, curvature=curvature)
    assert 0.2 < first < 2.0
    assert 0.003 < second < 0.02
    assert len(scheduler.parabolas) == 2
    _, (first, second) = two_groups(per_group=False, curvature=curvature)
    assert first == second < 0.02


def test_plain_gradient_descent_with_the_published_rule_is_exact_line_search():
    """Without smoothing; the Kantorovich bound on each step: a factor ((κ − 1) / (κ + 1))²."""
    matrix = spd_matrix(8, 20.0)
    weight = nn.Parameter(torch.ones(8, dtype=torch.float64))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scheduler = ExactGeNLR(
        optimizer,
        rule="published",
        probe="same_batch",
        curvature="hessian",
        every_n_steps=1,
        final_decay=0.0,
        lr_max=100.0,
    )
    scheduler.rules[0].smoothing = 0.0

    def loss():
        return weight @ matrix @ weight / 2

    for _ in range(30):
        before = loss().item()
        gradient = matrix @ weight.detach()
        scheduler.probe(loss)
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        scheduler.step()
        assert loss().item() <= before * (19 / 21) ** 2 * (1 + 1e-9)
        # an exact line search ends where the new gradient is orthogonal to the old
        assert abs(gradient @ matrix @ weight.detach()) < 1e-9 * gradient.norm() ** 2


def test_probing_on_the_next_batch_agrees_with_probing_at_the_start():
    """On a quadratic the slope where a step ends says what it was where the step began."""
    weight, loss = quadratic()
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scheduler = ExactGeNLR(optimizer)
    for _ in range(12):
        start = weight.detach().clone()
        scheduler.probe(loss)
        optimizer.zero_grad()
        loss().backward()
        gradient = weight.grad.clone()
        optimizer.step()
        scheduler.step()
    scheduler.probe(loss)
    with torch.no_grad():
        weight.copy_(start)
    expected = exact_parabola(loss, [weight], [gradient])
    assert scheduler.parabolas[0].slope == pytest.approx(expected.slope, rel=1e-9)
    assert scheduler.parabolas[0].curvature == pytest.approx(expected.curvature, rel=1e-9)


def loop(optimizer, scheduler, loss, steps):
    for _ in range(steps):
        scheduler.probe(loss)
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        scheduler.step()


def test_the_relation_of_groups_survives_a_warm_up_that_is_replaced():
    weights = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))]
    optimizer = torch.optim.SGD([{"params": weights[:1], "lr": 3e-4}, {"params": weights[1:], "lr": 1e-4}])
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 10))
    scheduler = ExactGeNLR(optimizer)
    loop(optimizer, scheduler, lambda: sum(weight.square().sum() for weight in weights), 5)
    first, second = scheduler.get_lr()
    assert first == pytest.approx(3 * second) != 0.0


def test_groups_that_come_later_are_taken_over():
    weights = [nn.Parameter(torch.full((2,), 3.0)), nn.Parameter(torch.full((2,), 3.0))]
    loss = lambda: sum(weight.square().sum() for weight in weights)  # noqa: E731
    for per_group in (False, True):
        optimizer = torch.optim.SGD(weights[:1], lr=1.0)
        scheduler = ExactGeNLR(optimizer, per_group=per_group)
        loop(optimizer, scheduler, loss, 10)
        optimizer.add_param_group({"params": weights[1:], "lr": float(scheduler.get_lr()[0]) / 4})
        loop(optimizer, scheduler, loss, 1)
        first, second = scheduler.get_lr()
        assert second == pytest.approx(first / 4) or per_group
        loop(optimizer, scheduler, loss, 10)
        assert all(rate > 0.0 for rate in scheduler.get_lr())
        assert len(scheduler.get_lr()) == 2


@pytest.mark.parametrize("what", ["no gradient", "frozen"])
def test_a_group_that_does_not_move_holds_up_no_other(what):
    weights = [nn.Parameter(torch.full((2,), 3.0)), nn.Parameter(torch.ones(2), requires_grad=what == "no gradient")]
    optimizer = torch.optim.SGD([{"params": [weight]} for weight in weights], lr=1.0)
    scheduler = ExactGeNLR(optimizer, per_group=True)
    loop(optimizer, scheduler, lambda: weights[0].square().sum(), 30)
    assert scheduler.looks == 30  # once a step: the first on its own batch, the others on the next
    assert scheduler.get_lr()[0] > 0.0
    assert torch.equal(weights[1].detach(), torch.ones(2))


def test_a_step_that_failed_leaves_nothing_behind():
    weight, loss = quadratic()
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scheduler = ExactGeNLR(optimizer, every_n_steps=4)
    scheduler.rules[0].lr, scheduler.rules[0].settled = 0.1, True
    scheduler.probe(loss)

    def fails():
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        optimizer.step(fails)
    scheduler.step()
    loss().backward()
    before, gradient = weight.detach().clone(), weight.grad.clone()
    optimizer.step()
    assert torch.allclose(weight.detach(), before - 0.1 * gradient)


def test_an_update_is_loaded_to_where_its_weights_are():
    scheduler, twin = (
        ExactGeNLR(torch.optim.SGD([nn.Parameter(torch.ones(2, device=device))], lr=1.0)) for device in ("cpu", "meta")
    )
    twin.load_state_dict(scheduler.state_dict() | {"update": [torch.ones(2)]})
    assert twin.state_dict()["update"][0].device.type == "meta"


def test_states_of_others_are_refused():
    make = lambda **options: ExactGeNLR(torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=1.0), **options)  # noqa: E731
    with pytest.raises(ValueError, match="state of another scheduler"):
        make().load_state_dict({"last_epoch": 3})
    with pytest.raises(ValueError, match=r"state of \['PublishedRule'\], .* rules \['AveragedRule'\]"):
        make().load_state_dict(make(rule="published").state_dict())


@pytest.mark.parametrize(
    ("curvature", "forward", "backward"),
    [("three_point", 3, 0), ("hessian", 1, 3), ("finite_difference", 2, 2), ("gauss_newton", 1, 0)],
)
def test_looks_take_the_passes_of_their_curvature(curvature, forward, backward):
    net = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    scheduler = ExactGeNLR(optimizer, curvature=curvature)
    calls = {"forward": 0, "backward": 0}

    def loss():
        calls["forward"] += 1
        features = net(torch.ones(4, 3))
        features.register_hook(lambda gradient: calls.update(backward=calls["backward"] + (gradient is not None)))
        outputs = 2 * features
        return outputs.square().mean(), outputs

    scheduler.probe(loss)
    loss()[0].backward()
    optimizer.step()
    scheduler.step()
    calls.update(forward=0, backward=0)
    scheduler.probe(loss)
    assert calls["forward"] == forward
    assert (calls["backward"] > 0) == (backward > 0)


def test_the_final_decay_ends_at_zero():
    weight, loss = quadratic()
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scheduler = ExactGeNLR(optimizer, total_steps=100, final_decay=0.5)
    rates = []
    for _ in range(100):
        scheduler.probe(loss)
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        scheduler.step()
        rates.append(scheduler.get_last_lr()[0] / scheduler.rules[0].lr)
    assert rates[48] == 1.0
    assert rates[74] == pytest.approx(0.5)
    assert rates[-1] == 0.0


@pytest.mark.parametrize("per_group", [False, True])
def test_the_scheduler_goes_on_from_its_state(tmp_path, per_group):
    matrix = spd_matrix(6, 20.0).float()

    def train(steps, resume=None):
        weights = [nn.Parameter(torch.linspace(-1, 1, 3)), nn.Parameter(torch.linspace(2, 1, 3))]
        optimizer = torch.optim.SGD([{"params": [weight]} for weight in weights], lr=1.0, momentum=0.9)
        scheduler = ExactGeNLR(optimizer, total_steps=40, per_group=per_group)

        def loss():
            return torch.cat(weights) @ matrix @ torch.cat(weights) / 2

        if resume is not None:
            state = torch.load(resume, weights_only=True)
            with torch.no_grad():
                for weight, value in zip(weights, state["weights"], strict=True):
                    weight.copy_(value)
            optimizer.load_state_dict(state["optimizer"])
            scheduler.load_state_dict(state["scheduler"])
        for _ in range(scheduler.last_epoch, steps):
            scheduler.probe(loss)
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()
            scheduler.step()
        values = [weight.detach() for weight in weights]
        state = {"weights": values, "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
        torch.save(state, tmp_path / f"{steps}.pt")
        return torch.cat(values)

    whole = train(40)
    for steps in (1, 7, 23):
        train(steps)
        assert torch.equal(train(40, resume=tmp_path / f"{steps}.pt"), whole)


def test_the_optimizer_is_left_alone_after_detaching():
    weight, loss = quadratic()
    optimizer = torch.optim.SGD([weight], lr=0.1)
    scheduler = ExactGeNLR(optimizer)
    scheduler.detach()
    optimizer.param_groups[0]["lr"] = 0.5
    loss().backward()
    gradient, before = weight.grad.clone(), weight.detach().clone()
    optimizer.step()
    assert torch.equal(weight.detach(), before - 0.5 * gradient)


def test_a_loss_is_needed():
    weight, loss = quadratic()
    optimizer = torch.optim.SGD([weight], lr=0.1)
    ExactGeNLR(optimizer)
    loss().backward()
    with pytest.raises(RuntimeError, match=r"call probe\(loss\) before optimizer.step"):
        optimizer.step()


@pytest.mark.parametrize(
    "optimizer_type", [torch.optim.LBFGS, torch.optim.Rprop, torch.optim.Adafactor], ids=lambda t: t.__name__
)
def test_optimizers_that_are_not_linear_in_their_rate_are_refused(optimizer_type):
    optimizer = optimizer_type([nn.Parameter(torch.ones(3))])
    with pytest.raises(ValueError, match=f"ExactGeN needs an optimizer whose .*{optimizer_type.__name__}"):
        check_linear_in_lr(optimizer)


def test_no_list_of_names_decides():
    class Own(torch.optim.Optimizer):
        def __init__(self, params, lr=1e-3, power=1.0):
            super().__init__(params, {"lr": lr, "power": power})

        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.sub_(parameter.grad, alpha=group["lr"] ** group["power"])

    check_linear_in_lr(Own([nn.Parameter(torch.ones(2))]))
    with pytest.raises(ValueError, match="that of Own is not"):
        check_linear_in_lr(Own([nn.Parameter(torch.ones(2))], power=2.0))


def test_optimizers_of_matrices_are_tried_out_on_one_and_none_may_maximize():
    class Matrices(torch.optim.SGD):
        def step(self, closure=None):
            assert all(weight.ndim == 2 for group in self.param_groups for weight in group["params"])
            return super().step(closure)

    check_linear_in_lr(Matrices([nn.Parameter(torch.ones(2, 2))], lr=0.1))
    with pytest.raises(ValueError, match="this SGD maximizes"):
        check_linear_in_lr(torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1, maximize=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"total_steps": 0}, "total_steps to be an integer >= 1"),
        ({"per_group": "no"}, "per_group to be True or False"),
        ({"every_n_steps": 0}, "every_n_steps"),
        ({"rule": "magic"}, "expected rule to be one of"),
        ({"probe": "none"}, "expected probe to be one of"),
        ({"lr_min": 1.0, "lr_max": 0.1}, "0 < lr_min <= lr_max"),
        ({"lr_min": 0.0}, "0 < lr_min"),
        ({"final_decay": 2.0}, "0 <= final_decay <= 1"),
        ({"curvature": "kfac"}, "expected curvature to be one of"),
        ({"per_group": True, "probe": "same_batch"}, "per_group=True needs probe='next_batch'"),
    ],
    ids=str,
)
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        ExactGeNLR(torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1), **options)
