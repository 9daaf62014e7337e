"""Concrete dropout."""

import math

import pytest
import torch
from torch import nn

from lightning_ifthpo.hyperparameters import Dropout
from tests.helpers.hyperparameters import EXTREMES, fill, float64


def test_entries_are_dropped_at_the_rates_asked_for():
    dropout = Dropout((2, 1), initial=0.25)
    with torch.no_grad():
        dropout.logits[1] = 0.0
    assert dropout.natural_values().flatten().tolist() == pytest.approx([0.25, 0.45])
    masks = dropout(torch.ones(100, 2, 1000)) * (1.0 - dropout.natural_values())
    # 100,000 draws know a rate p to √(p (1 − p) / 100,000), at most 0.0016; five of these
    assert (masks < 0.5).float().mean(dim=(0, 2)).tolist() == pytest.approx([0.25, 0.45], abs=0.008)


def test_at_a_low_temperature_it_is_the_dropout_of_torch():
    dropout, x = Dropout(initial=0.3, temperature=1e-4), torch.ones(100_000)
    values = dropout(x)
    plain = nn.Dropout(0.3)(x)
    soft = ((values - 0.0).abs() > 1e-6) & ((values - 1.0 / 0.7).abs() > 1e-6)
    assert soft.float().mean() < 0.01
    assert values.mean().item() == pytest.approx(plain.mean().item(), abs=5 * math.sqrt(2 * 0.3 / 0.7 / 100_000))


def test_a_high_temperature_makes_soft_masks():
    masks = Dropout(initial=0.5, temperature=10.0)(torch.ones(1000)) * 0.5
    assert masks.min() > 0.2
    assert masks.max() < 0.8


def test_the_derivative_is_that_of_the_expected_loss():
    """The second moment of a mask (1 − z) / (1 − p) is about 1 / (1 − p), with the derivative 1 / (1 − p)²."""
    dropout = Dropout(initial=0.5, maximum=0.99, temperature=0.02).double().requires_grad_(True)
    loss = dropout(torch.ones(1_000_000, dtype=torch.float64)).square().mean()
    (gradient,) = torch.autograd.grad(loss, dropout.logits)
    p = dropout.natural_values().item()
    # a relaxed mask at this temperature has a bias of its order, 2 %, and gradients a standard error of about 1 %
    assert loss.item() == pytest.approx(1.0 / (1.0 - p), rel=0.05)
    assert gradient.item() == pytest.approx(p * (1.0 - p / 0.99) / (1.0 - p) ** 2, rel=0.1)


def test_it_can_stand_inside_a_sequence_of_layers_and_drops_in_training_mode_only():
    net, x = nn.Sequential(nn.Linear(4, 8), Dropout((8,)), nn.Linear(8, 2)), torch.randn(5, 4)
    assert not torch.equal(net(x), net(x))
    net.eval()
    assert torch.equal(net(x), net[2](net[0](x)))


def test_masks_are_drawn_from_the_random_state_of_torch():
    dropout, x = Dropout(), torch.ones(8)
    torch.manual_seed(3)
    first, second = dropout(x), dropout(x)
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(dropout(x), first)


@pytest.mark.parametrize("extreme", EXTREMES)
@pytest.mark.parametrize("maximum", [0.3, 0.99])
def test_rates_stay_in_their_range(extreme, maximum):
    dropout = Dropout((3,), maximum=maximum).double()
    fill(dropout, extreme)
    assert all(0.0 <= rate <= maximum for rate in dropout.natural_values().tolist())
    x = float64(1000, 3)
    if extreme == -1e4:
        assert torch.equal(dropout(x), x)
    if extreme == 1e4:
        assert dropout.natural_values().tolist() == [maximum] * 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_small_rates_hold_in_half_precision(dtype):
    values = Dropout(initial=0.01).to(dtype)(torch.ones(400_000, dtype=dtype))
    assert values.dtype == dtype
    # standard error √(0.01 / 400,000) = 0.00016; the rounding of λ in bfloat16 is 2⁻⁹ of 4.5
    assert (values < 0.5).double().mean().item() == pytest.approx(0.01, abs=0.001)


def test_repr_shows_bound_and_temperature():
    assert repr(Dropout()) == "Dropout(maximum=0.9, temperature=0.1)"


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Dropout(initial=0.0), ValueError, "0 < initial < maximum <= 0.99, got initial=0.0"),
        (lambda: Dropout(initial=0.9), ValueError, "0 < initial < maximum <= 0.99"),
        (lambda: Dropout(maximum=1.0), ValueError, "maximum <= 0.99, got initial=0.1 and maximum=1.0"),
        (lambda: Dropout(temperature=0.0), ValueError, "0 < temperature < inf, got 0.0"),
        (lambda: Dropout(3), ValueError, "shape to be a tuple of positive sizes, got 3"),
        (lambda: Dropout((3,))(torch.ones(2, 1)), ValueError, r"rates of shape \(3,\) do not broadcast .* \(2, 1\)"),
        (lambda: Dropout()(torch.ones(2).long()), TypeError, "got torch.int64; convert it before entries are dropped"),
    ],
)
def test_refuses(make, error, message):
    with pytest.raises(error, match=message):
        make()
