"""Temperature and focal loss."""

import math

import pytest
import torch
import torch.nn.functional as F

from lightning_ifthpo.hyperparameters import FocalGamma, Temperature
from tests.helpers.hyperparameters import EXTREMES, fill

TARGETS = torch.tensor([0, 2, 1])


def test_what_belongs_to_the_loss_does_not_depend_on_the_mode():
    logits = torch.randn(3, 3)
    temperature, focal = Temperature(3, initial=2.0), FocalGamma(3)
    assert torch.equal(temperature.train()(logits), temperature.eval()(logits))
    assert torch.equal(focal.train()(logits, TARGETS), focal.eval()(logits, TARGETS))


# Temperature


@pytest.mark.parametrize("initial", [0.11, 0.5, 1.0, 3.0, 9.0])
def test_temperature_starts_where_it_is_told(initial):
    assert float(Temperature(initial=initial).natural_values()) == pytest.approx(initial, rel=1e-5)
    assert Temperature(4, initial=initial).natural_values().tolist() == pytest.approx([initial] * 4, rel=1e-5)


@pytest.mark.parametrize("maximum", [2.0, 10.0])
def test_a_temperature_stays_between_its_bounds(maximum):
    temperature = Temperature(maximum=maximum)
    for extreme in EXTREMES:
        fill(temperature, extreme)
        assert 1 / maximum * (1 - 1e-5) <= float(temperature.natural_values()) <= maximum * (1 + 1e-5)
    assert float(temperature.natural_values()) == pytest.approx(maximum)


def test_a_temperature_of_each_class_divides_its_logit():
    temperature = Temperature(3)
    with torch.no_grad():
        temperature.logits[1] = 30.0
    assert torch.allclose(temperature(torch.ones(2, 5, 3)), torch.tensor([1.0, 0.1, 1.0]).expand(2, 5, 3))
    assert Temperature()(torch.ones(7)).tolist() == pytest.approx([1.0] * 7)


def test_a_step_of_the_unit_changes_a_temperature_by_about_a_factor():
    temperature = Temperature().requires_grad_(True)
    (slope,) = torch.autograd.grad(temperature.natural_values().log(), temperature.logits)
    assert float(slope) == pytest.approx(math.log(10.0) / 2)  # log T = 2 log(maximum) (σ − 1/2)


# FocalGamma


def test_the_focal_loss_is_that_of_its_formula():
    logits = torch.randn(3, 4, dtype=torch.float64)
    p = logits.softmax(1)[torch.arange(3), TARGETS]
    focal = FocalGamma(4, initial=1.7).double()
    assert torch.allclose(focal(logits, TARGETS), -((1 - p) ** 1.7) * p.log())


def test_a_gamma_near_zero_is_the_cross_entropy():
    logits = torch.randn(3, 4)
    wanted = F.cross_entropy(logits, TARGETS, reduction="none")
    assert torch.allclose(FocalGamma(4, initial=1e-6)(logits, TARGETS), wanted, rtol=1e-4)


def test_gamma_of_each_class_is_for_the_examples_with_its_label():
    focal, logits = FocalGamma(3, per_class=True, initial=1.0), torch.randn(3, 3)
    with torch.no_grad():
        focal.logits[2] = 0.0  # half of the maximum
    assert focal.natural_values().tolist() == pytest.approx([1.0, 1.0, 2.5])
    losses = focal(logits, TARGETS)
    assert torch.allclose(losses[1], FocalGamma(3, initial=2.5)(logits, TARGETS)[1])
    assert torch.allclose(losses[[0, 2]], FocalGamma(3, initial=1.0)(logits, TARGETS)[[0, 2]])
    assert FocalGamma(3).natural_values().tolist() == pytest.approx([0.5])


@pytest.mark.parametrize("extreme", EXTREMES)
def test_gamma_is_bounded(extreme):
    focal = FocalGamma(3, maximum=4.0)
    fill(focal, extreme)
    assert 0.0 <= float(focal.natural_values()) <= 4.0


@pytest.mark.parametrize("gap", [-1e4, -100.0, 0.0, 100.0, 1e4])
def test_the_focal_loss_and_its_derivatives_are_finite_for_certain_networks(gap):
    focal = FocalGamma(3).requires_grad_(True)
    logits = torch.tensor([[gap, 0.0, 1.0]], requires_grad=True)
    loss = focal(logits, torch.tensor([0])).sum()
    first = torch.autograd.grad(loss, [logits, focal.logits], create_graph=True)
    second = torch.autograd.grad(first[0].square().sum() + first[1].sum(), [logits, focal.logits])
    assert all(bool(tensor.isfinite().all()) for tensor in (loss, *first, *second))
    if gap < 0:  # certain and wrong: the plain cross-entropy, 1 + log(1 + 1/e) more than the gap
        assert float(loss.detach()) == pytest.approx(-gap + 1 + math.log1p(math.exp(-1)), rel=1e-5)


def test_the_repr_has_the_bounds():
    assert repr(Temperature(maximum=5.0)) == "Temperature(maximum=5)"
    assert repr(FocalGamma(3)) == "FocalGamma(maximum=5)"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Temperature(1), "classes to be an integer >= 2, got 1"),
        (lambda: Temperature(initial=0.1), "1/maximum < initial < maximum"),
        (lambda: Temperature(initial=10.0), "got initial=10.0 and maximum=10.0"),
        (lambda: Temperature(maximum=1.0), "maximum > 1, got initial=1.0 and maximum=1.0"),
        (lambda: Temperature(maximum=math.inf), "maximum < inf"),
        (lambda: Temperature(3)(torch.zeros(2, 4)), r"logits of 3 classes, got shape \(2, 4\)"),
        (lambda: Temperature(3)(torch.tensor(0.0)), r"logits of 3 classes, got shape \(\)"),
        (lambda: FocalGamma(1), "classes to be an integer >= 2, got 1"),
        (lambda: FocalGamma(3, per_class=1), "per_class to be True or False, got 1"),
        (lambda: FocalGamma(3, initial=0.0), "0 < initial < maximum"),
        (lambda: FocalGamma(3, initial=5.0), "0 < initial < maximum"),
        (lambda: FocalGamma(3)(torch.zeros(2, 4), torch.tensor([0, 1])), r"shape \[B, 3\] .* got \(2, 4\) and \(2,\)"),
        (lambda: FocalGamma(3)(torch.zeros(2, 3), torch.tensor([0])), r"got \(2, 3\) and \(1,\)"),
        (lambda: FocalGamma(3)(torch.zeros(3), torch.tensor([0])), r"got \(3,\) and \(1,\)"),
    ],
)
def test_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        make()
