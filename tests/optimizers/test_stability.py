"""The stability edge, against what optimizers really do on quadratics of known curvature."""

import math

import pytest
import torch

from lightning_ifthpo.curvature import MatrixOperator
from lightning_ifthpo.spectrum import lanczos
from lightning_ifthpo.stability import StabilityEdge
from tests.helpers.device import DEVICE, FLOAT64
from tests.helpers.problems import spd_matrix

SIZES = (6, 4)  # of two parameter groups


def growth(optimizer_type, ratio, *, second_group=None, prepared_state=False, **options):
    """Trains on wᵀHw/2 with H scaled to an edge ratio, and returns how much steps grew over the second half."""
    torch.manual_seed(3)
    weights = [torch.randn(size, **FLOAT64, requires_grad=True) for size in SIZES]
    with torch.no_grad():
        for weight in weights:
            weight *= 1e-100  # so that gradients leave the second moments of the optimizer as they are
    optimizer = optimizer_type([{"params": weights[:1]}, {"params": weights[1:]} | (second_group or {})], **options)
    if prepared_state:
        prepare(optimizer, weights)
    edge = StabilityEdge.of([optimizer], weights)
    matrix = spd_matrix(sum(SIZES), 100.0, dtype=torch.float64)

    def measured(matrix):
        operator = MatrixOperator(matrix)
        top = lanczos(operator if edge.metric is None else operator.preconditioned(edge.metric), vectors=True)
        return edge.ratio(float(top.largest[0]), top.largest_vectors[0])

    # the ratio is affine in the scale of H, because weight decay adds to it
    at_zero, at_one = measured(0 * matrix), measured(matrix)
    matrix = matrix * (ratio - at_zero) / (at_one - at_zero)
    assert measured(matrix) == pytest.approx(ratio, rel=1e-3)
    steps, lengths = 1200, []
    for _ in range(steps):
        before = torch.cat([weight.detach() for weight in weights])
        slope = matrix @ before
        for weight, part in zip(weights, slope.split(SIZES), strict=True):
            weight.grad = part
        optimizer.step()
        lengths.append(float((torch.cat([weight.detach() for weight in weights]) - before).norm()))
    return lengths[-1] / lengths[steps // 2]


def prepare(optimizer, weights):
    """Gives the optimizer second moments between 0.3 and 3, at a late step, so that they stay."""
    for weight in weights:
        moments = torch.logspace(-0.5, 0.5, weight.numel(), **FLOAT64)
        zero = torch.zeros_like(weight)
        step = torch.tensor(1e7)
        optimizer.state[weight] = {
            torch.optim.RMSprop: {"step": step, "square_avg": moments, "momentum_buffer": zero},
            torch.optim.Adagrad: {"step": torch.tensor(100.0), "sum": moments},
        }.get(type(optimizer), {"step": step, "exp_avg": zero, "exp_avg_sq": moments, "mu_product": torch.tensor(0.0)})


SGD, ADAM = torch.optim.SGD, torch.optim.Adam


LATE = {"betas": (0.9, 1 - 1e-12)}  # second moments that do not forget


CASES = {
    "gradient descent": (SGD, {"lr": 0.1}),
    "heavy ball": (SGD, {"lr": 0.1, "momentum": 0.9}),
    "heavy ball, dampened": (SGD, {"lr": 0.1, "momentum": 0.8, "dampening": 0.5}),
    "Nesterov": (SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "weight decay": (SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 2.0}),
    "two rates": (SGD, {"lr": 0.1, "momentum": 0.9, "second_group": {"lr": 0.02}}),
    "two momenta": (SGD, {"lr": 0.1, "momentum": 0.9, "second_group": {"momentum": 0.1}}),
    "a group at rest": (SGD, {"lr": 0.1, "second_group": {"lr": 0.0}}),
    "Adam": (ADAM, {"lr": 0.1, "prepared_state": True} | LATE),
    "Adam, two rates": (ADAM, {"lr": 0.1, "prepared_state": True, "second_group": {"lr": 0.3}} | LATE),
    "Adam, other β": (ADAM, {"lr": 0.1, "prepared_state": True, "betas": (0.5, 1 - 1e-12)}),
    "AdamW": (torch.optim.AdamW, {"lr": 0.1, "prepared_state": True, "weight_decay": 2.0} | LATE),
    "NAdam": (torch.optim.NAdam, {"lr": 0.1, "prepared_state": True} | LATE),
    "RMSprop": (torch.optim.RMSprop, {"lr": 0.1, "prepared_state": True, "alpha": 1 - 1e-12}),
    "RMSprop, momentum": (
        torch.optim.RMSprop,
        {"lr": 0.1, "prepared_state": True, "alpha": 1 - 1e-12, "momentum": 0.9},
    ),
    "Adagrad": (torch.optim.Adagrad, {"lr": 0.1, "prepared_state": True, "lr_decay": 1e-6}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_training_is_stable_below_the_edge_and_grows_beyond_it(name):
    optimizer_type, options = CASES[name]
    assert growth(optimizer_type, 0.98, **options) < 0.9
    assert growth(optimizer_type, 1.02, **options) > 10


@pytest.mark.parametrize(
    ("options", "edge"),
    [
        ({}, 2 / 0.1),
        ({"momentum": 0.9}, 2 * 1.9 / 0.1),
        ({"momentum": 0.9, "nesterov": True}, 2 * 1.9 / (0.1 * 2.8)),
    ],
    ids=str,
)
def test_the_edges_of_gradient_descent(options, edge):
    weight = torch.zeros(3, requires_grad=True, device=DEVICE)
    found = StabilityEdge.of([SGD([weight], lr=torch.tensor(0.1, device=DEVICE), **options)], [weight])
    assert (found.sharpness, found.metric) == (pytest.approx(edge), None)


def test_the_edge_of_adam_after_many_steps_is_38_over_the_learning_rate():
    weight = torch.zeros(3, requires_grad=True, device=DEVICE)
    optimizer = ADAM([weight], lr=3e-3)
    for _ in range(200):
        weight.grad = torch.tensor([1.0, -2.0, 4.0], device=DEVICE)
        optimizer.step()
    found = StabilityEdge.of([optimizer], [weight])
    assert found.sharpness == pytest.approx(38 / 3e-3, rel=1e-6)
    assert found.metric.tolist() == pytest.approx([1.0, 0.5, 0.25], rel=1e-5)


def test_early_in_training_the_first_moment_is_corrected_too():
    weight = torch.zeros(1, requires_grad=True, device=DEVICE)
    optimizer = ADAM([weight], lr=3e-3)
    weight.grad = torch.ones(1, device=DEVICE)
    optimizer.step()
    assert StabilityEdge.of([optimizer], [weight]).sharpness == pytest.approx(3.8 / 3e-3, rel=1e-6)


def test_unknown_optimizers_have_no_known_edge():
    weight = torch.zeros(3, requires_grad=True, device=DEVICE)
    assert StabilityEdge.of([torch.optim.Rprop([weight])], [weight]) is None


def test_weights_that_do_not_move_have_no_part_in_it():
    moving, resting = (
        torch.zeros(2, requires_grad=True, device=DEVICE),
        torch.zeros(1, requires_grad=True, device=DEVICE),
    )
    found = StabilityEdge.of([SGD([moving], lr=0.1)], [moving, resting])
    assert found.metric.tolist() == [1.0, 1.0, 0.0]


def test_at_a_learning_rate_of_zero_nothing_is_unstable():
    weight = torch.zeros(3, requires_grad=True, device=DEVICE)
    edge = StabilityEdge.of([SGD([weight], lr=0.0)], [weight])
    assert edge.sharpness == math.inf
    assert edge.ratio(5.0, torch.ones(3, device=DEVICE)) == 0.0


def test_one_optimizer_and_a_generator_of_parameters_will_do():
    net = torch.nn.Linear(2, 1)
    edge = StabilityEdge.of(SGD(net.parameters(), lr=0.1), net.parameters())
    assert repr(edge) == "StabilityEdge(sharpness=20.0)"


def test_an_optimizer_that_maximizes_has_no_edge():
    weight = torch.zeros(3, requires_grad=True, device=DEVICE)
    assert StabilityEdge.of(SGD([weight], lr=0.1, maximize=True), [weight]) is None


def test_a_decay_that_diverges_by_itself_is_far_beyond_the_edge():
    weight = torch.zeros(3, requires_grad=True, device=DEVICE)
    edge = StabilityEdge.of(torch.optim.AdamW([weight], lr=1.0, weight_decay=2.0), [weight])
    assert edge.ratio(1.0, torch.ones(3, device=DEVICE)) > 1e6


def test_weights_without_an_optimizer_have_no_part_in_it_at_a_learning_rate_of_zero_either():
    held, free = torch.zeros(2, requires_grad=True, device=DEVICE), torch.zeros(1, requires_grad=True, device=DEVICE)
    assert StabilityEdge.of([SGD([held], lr=0.0)], [held, free]).metric.tolist() == [1.0, 1.0, 0.0]
