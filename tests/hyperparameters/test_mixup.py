"""Mixup with a learned concentration."""

import math

import pytest
import torch
import torch.nn.functional as F

from lightning_ifthpo.hyperparameters import Mixup
from tests.helpers.hyperparameters import EXTREMES, fill


def shares(mixup, count):
    """The share of each example in its mixture: examples are 0, 1, 2, …, in classes of their own."""
    _, targets = mixup(torch.zeros(count, 1), torch.arange(count))
    own = targets.diagonal()
    return own[own < 1.0]  # an example that meets itself stays as it is


def test_examples_and_targets_are_mixed_alike():
    x = torch.eye(6).view(6, 1, 2, 3)  # example i is the unit vector i, and so is its target
    mixed, targets = Mixup(6, initial=1.0)(x, torch.arange(6))
    assert mixed.shape == x.shape
    assert torch.allclose(mixed.flatten(1), targets)
    assert torch.allclose(targets.sum(1), torch.ones(6))
    assert ((targets > 0).sum(1) <= 2).all()
    assert torch.allclose(Mixup(6).eval()(x, torch.arange(6))[1], torch.eye(6))
    assert Mixup(6).eval()(x, torch.arange(6))[0] is x


@pytest.mark.parametrize(
    ("concentration", "variance"),
    # 2 ψ'(a), with ψ'(1/2) = π²/2, ψ'(1) = π²/6 and ψ'(2) = π²/6 − 1
    [(0.5, math.pi**2), (1.0, math.pi**2 / 3), (2.0, math.pi**2 / 3 - 2)],
)
def test_logits_of_shares_have_the_variance_of_a_beta_distribution(concentration, variance):
    logits = Mixup(2, initial=concentration).double()._shares(100_000).logit()
    # the kurtosis of a logistic distribution is 4.2: a relative standard error of √(3.2 / 100,000); five of these
    assert logits.var().item() == pytest.approx(variance, rel=0.03)
    assert logits.mean().item() == pytest.approx(0.0, abs=5 * math.sqrt(variance / 100_000))


@pytest.mark.parametrize("concentration", [0.05, 0.1, 0.2, 0.4, 1.0, 3.0])
def test_quantiles_of_shares_are_close_to_those_of_a_beta_distribution(concentration):
    a = torch.tensor(concentration, dtype=torch.float64)
    wanted = torch.distributions.Beta(a, a).sample((100_000,)).sort().values
    shares = Mixup(2, initial=concentration).double()._shares(100_000).sort().values
    assert (shares - wanted).abs().mean() < 0.02


def test_an_example_keeps_its_share():
    measured = torch.cat([shares(Mixup(100, initial=1.0), 100) for _ in range(100)])
    # about 9,900 uniform numbers: five standard errors of mean and variance
    assert measured.mean().item() == pytest.approx(0.5, abs=0.0145)
    assert measured.var().item() == pytest.approx(1 / 12, abs=0.004)


def test_one_share_for_a_batch_or_one_for_each_example():
    torch.manual_seed(0)
    assert len(shares(Mixup(50, initial=1.0), 50).unique()) > 30
    assert len(shares(Mixup(50, initial=1.0, per_example=False), 50).unique()) == 1


def test_the_derivative_is_that_of_the_expected_loss():
    """At a = 1, E[m² + (1 − m)²] = 2/3; by the temperature its derivative is −1/6, and dt/da = ζ(3) · 6/π²."""
    mixup = Mixup(2, initial=1.0).double().requires_grad_(True)
    m = mixup._shares(200_000)
    loss = (m.square() + (1 - m).square()).mean()
    (gradient,) = torch.autograd.grad(loss, mixup.logit)
    slope = (1.0 - 0.02) * (4.0 - 1.0) / (4.0 - 0.02)  # da/dλ
    # five standard errors of 200,000 draws are below 0.005 and below 1 %
    assert loss.item() == pytest.approx(2 / 3, abs=0.005)
    assert gradient.item() == pytest.approx(-slope / 6 * 1.2020569 * 6 / math.pi**2, rel=0.02)


def test_soft_targets_are_mixed_too():
    mixup, targets = Mixup(3), torch.tensor([0, 2, 1])
    torch.manual_seed(1)
    _, hard = mixup(torch.zeros(3, 1), targets)
    torch.manual_seed(1)
    _, soft = mixup(torch.zeros(3, 1), F.one_hot(targets, 3).float())
    assert torch.equal(hard, soft)


def test_random_numbers_are_those_of_torch():
    mixup, x, y = Mixup(3), torch.randn(5, 2), torch.tensor([0, 1, 2, 1, 0])
    torch.manual_seed(3)
    first, second = mixup(x, y), mixup(x, y)
    assert not torch.equal(first[0], second[0])
    torch.manual_seed(3)
    assert torch.equal(mixup(x, y)[0], first[0])


@pytest.mark.parametrize("extreme", EXTREMES)
def test_the_concentration_stays_in_its_range(extreme):
    mixup = Mixup(3, maximum=2.0)
    fill(mixup, extreme)
    eps = torch.finfo(torch.float32).eps  # 0.02 is rounded
    assert 0.02 * (1.0 - eps) <= float(mixup.natural_values()) <= 2.0
    if abs(extreme) == 1e4:
        assert float(mixup.natural_values()) == pytest.approx(2.0 if extreme > 0 else 0.02)


def test_at_the_least_concentration_hardly_anything_is_mixed():
    mixup = Mixup(100)
    fill(mixup, -1e4)
    measured = torch.cat([shares(mixup, 100) for _ in range(20)])
    assert (torch.minimum(measured, 1 - measured) < 0.1).float().mean() > 0.93


def test_repr_shows_classes_and_bound():
    assert repr(Mixup(3)) == "Mixup(3, maximum=4, per_example=True)"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Mixup(1), "classes to be an integer >= 2, got 1"),
        (lambda: Mixup(3, initial=0.02), "0.02 < initial < maximum < inf, got initial=0.02 and maximum=4.0"),
        (lambda: Mixup(3, initial=4.0), "0.02 < initial < maximum < inf"),
        (lambda: Mixup(3, maximum=float("inf")), "0.02 < initial < maximum < inf"),
        (lambda: Mixup(3, per_example=1), "per_example to be True or False"),
        (lambda: Mixup(3)(torch.ones(2, 4), torch.zeros(3).long()), r"expected targets \[2\] or \[2, 3\], got \(3,\)"),
        (lambda: Mixup(3)(torch.ones(2, 4), torch.zeros(2, 2)), r"expected targets \[2\] or \[2, 3\], got \(2, 2\)"),
    ],
)
def test_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_derivative_is_finite_for_the_least_random_number(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "uniform_", torch.Tensor.zero_)  # which torch draws once in 2²⁵ numbers
    mixup = Mixup(2).requires_grad_(True)
    mixed, _ = mixup(torch.arange(6.0).view(3, 2), torch.tensor([0, 1, 1]))
    (gradient,) = torch.autograd.grad(mixed.square().sum(), mixup.logit)
    assert bool(gradient.isfinite())


def test_integers_are_refused_and_small_labels_are_not():
    with pytest.raises(TypeError, match=r"floating-point input, got torch\.int64"):
        Mixup(2)(torch.arange(4), torch.tensor([0, 1, 1, 0]))
    labels = torch.tensor([0, 1, 1], dtype=torch.uint8)
    assert Mixup(2).eval()(torch.ones(3, 2), labels)[1].tolist() == [[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]
