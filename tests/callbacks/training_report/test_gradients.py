"""Norms of gradients, movement of layers, and the gradient noise scale."""

import math

import pytest
import torch
from torch import nn

from lightning_ifthpo.callbacks.training_report.gradients import LayerWatch, NoiseScale, gradient_norm
from tests.checks import check_state_is_plain
from tests.helpers.device import DEVICE
from tests.helpers.trainers import same


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).to(DEVICE)


def step(model, watch, lr=0.1, units=frozenset()):
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    optimizer.zero_grad()
    model(torch.ones(5, 3, device=DEVICE)).square().sum().backward()
    watch.before_step(model.named_parameters(), units)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    optimizer.step()
    watch.after_step()
    return before


def test_each_layer_is_measured():
    model, watch = net(), LayerWatch()
    before = step(model, watch)
    for name, weight in model.named_parameters():
        layer = watch.layers[name]
        assert layer.norm == layer.first_norm == pytest.approx(float(before[name].norm()), rel=1e-5)
        assert layer.gradient == pytest.approx(float(weight.grad.norm()), rel=1e-5)
        moved = float((weight.detach() - before[name]).norm() / before[name].norm())
        assert layer.ratio == pytest.approx(moved, rel=1e-4)
        assert (layer.measurements, layer.unmoved, layer.without_gradient) == (1, 0, 0)
    total = math.hypot(*(float(weight.grad.norm()) for weight in model.parameters()))
    assert gradient_norm(model.parameters()) == pytest.approx(total, rel=1e-5)


def test_a_layer_that_gets_nothing_is_counted_until_it_does():
    model, watch = net(), LayerWatch()
    with torch.no_grad():
        model[0].bias[:] = -100.0
    unused = nn.Linear(2, 2).to(DEVICE)
    model.add_module("unused", nn.Identity())
    model.unused.weight = unused.weight
    step(model, watch)
    step(model, watch)
    assert watch.layers["0.weight"].zero_gradient == 2
    assert watch.layers["0.weight"].unmoved == 2
    assert watch.layers["unused.weight"].without_gradient == 2
    with torch.no_grad():
        model[0].bias[:] = 1.0
    step(model, watch)
    assert watch.layers["0.weight"].zero_gradient == watch.layers["0.weight"].unmoved == 0


def test_dead_units_are_rows_without_a_gradient_in_all_of_the_last_measurements():
    model, watch = net(), LayerWatch()
    units = frozenset({id(model[0].weight)})
    with torch.no_grad():
        model[0].bias[:3] = -100.0
        model[0].bias[3] = 100.0
    for _ in range(7):
        step(model, watch, 0.0, units)
    assert math.isnan(watch.layers["0.weight"].dead_units)
    with torch.no_grad():
        model[0].bias[0] = 100.0
    step(model, watch, 0.0, units)
    assert watch.layers["0.weight"].dead_units == 0.5  # of four, the first has had one at last
    with torch.no_grad():
        model[0].bias[0] = -100.0
    for _ in range(8):
        step(model, watch, 0.0, units)
    assert watch.layers["0.weight"].dead_units == 0.75
    assert math.isnan(watch.layers["2.weight"].dead_units)  # not among the units


@pytest.mark.parametrize("rows", [1, 63, 64, 65, 1000])
def test_units_are_rows_at_equal_distances(rows):
    weight, watch = nn.Parameter(torch.ones(rows, 2, device=DEVICE)), LayerWatch()
    weight.grad = torch.zeros(rows, 2, device=DEVICE)
    weight.grad[: rows // 2] = 1.0
    for _ in range(8):
        watch.before_step([("w", weight)], frozenset({id(weight)}))
    layer = watch.layers["w"]
    assert layer.rows == min(rows, 64)
    assert layer.dead_units == pytest.approx(0.5 if rows > 1 else 1.0, abs=0.05)  # of a sample


@pytest.mark.parametrize("kind", ["half", "double", "complex", "sparse", "large", "strided"])
def test_any_kind_of_weight_can_be_measured(kind):
    weight = {
        "half": lambda: torch.full((4, 4), 300.0, dtype=torch.float16),  # its square overflows
        "double": lambda: torch.ones(4, 4, dtype=torch.float64),
        "complex": lambda: torch.ones(4, dtype=torch.complex64),
        "sparse": lambda: torch.ones(4, 4),
        "large": lambda: torch.ones(100, 1000),
        "strided": lambda: torch.ones(6, 4).t(),
    }[kind]()
    length = float(weight.to(torch.complex128).norm().real)
    parameter = nn.Parameter(weight.to(DEVICE))
    gradient = parameter.detach().clone()
    parameter.grad = gradient.to_sparse() if kind == "sparse" else gradient
    watch = LayerWatch()
    watch.before_step([("w", parameter)], frozenset())
    with torch.no_grad():
        parameter.mul_(0.5)
    watch.after_step()
    assert watch.layers["w"].norm == pytest.approx(length, rel=1e-3)
    assert watch.layers["w"].ratio == pytest.approx(0.5, rel=1e-3)
    assert gradient_norm([parameter]) == pytest.approx(watch.layers["w"].norm, rel=1e-5)


def test_without_gradients_there_is_no_norm():
    assert math.isnan(gradient_norm(net().parameters()))


def test_the_noise_scale_of_known_gradients():
    """Micro-batch gradients G + ε with E|ε|² = S: the estimate is S/|G|², in micro-batches."""
    torch.manual_seed(0)
    scale, signal, dimension, micro = NoiseScale(), 2.0, 400, 4
    for _ in range(300):
        gradients = torch.randn(micro, dimension, dtype=torch.float64) * math.sqrt(12.0 / dimension)
        gradients[:, 0] += signal
        scale.add(float(gradients[0].norm()), float(gradients.mean(0).norm()), micro)
    assert scale.micro_batches == pytest.approx(12.0 / signal**2, rel=0.1)


def test_a_noise_scale_without_data_or_signal():
    scale = NoiseScale()
    assert math.isnan(scale.micro_batches)
    scale.add(math.nan, 1.0, 2)
    assert scale.pairs == 0
    scale.add(2.0, 1.0, 2)
    assert scale.micro_batches == math.inf
    restored = NoiseScale()
    restored.load_state_dict(scale.state_dict())
    assert restored.state_dict() == scale.state_dict()


def test_the_state_is_plain_and_can_be_restored():
    watch, restored = LayerWatch(), LayerWatch()
    step(net(), watch)
    check_state_is_plain(watch.state_dict())
    restored.load_state_dict(watch.state_dict())
    assert same(restored.state_dict(), watch.state_dict())
