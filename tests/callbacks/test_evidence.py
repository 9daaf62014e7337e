"""What later hypergradients say of a hyper step."""

import copy
import math

import pytest
import torch

from lightning_ifthpo.callbacks.evidence import Evidence
from tests.checks import check_state_is_plain

UNITS = [1.0, 1.0]


def descent(rate, steps, noise=0.0, seed=0):
    """Gradient descent on λ² / 2 in three dimensions, with gradients from other batches at each step."""
    generator = torch.Generator().manual_seed(seed)
    evidence, value = Evidence({}), torch.ones(3, dtype=torch.float64)
    for _ in range(steps):
        gradient = value + noise * torch.randn(3, dtype=torch.float64, generator=generator)
        after = value - rate * gradient
        tensors = [[vector[:1], vector[1:]] for vector in (gradient, value, after)]
        evidence.add(*tensors, UNITS, float(value @ value) / 2, evidence.steps + 3)
        value = after
    return evidence, value


def test_it_sums_what_is_predicted_and_what_the_next_hypergradient_confirms():
    evidence, _ = descent(0.5, 3)
    # λ = 1, 1/2, 1/4, and moves of −1/2, −1/4, −1/8, for each of three entries
    assert evidence.predicted == pytest.approx(3 * (1 / 2 + 1 / 8 + 1 / 32))
    assert evidence.confirmed == pytest.approx(3 * (1 / 4 + 1 / 16))
    terms = [3 / 4, 3 / 16]
    assert evidence.error == pytest.approx(math.sqrt(sum(term**2 for term in terms) - sum(terms) ** 2 / 2))
    assert evidence.travel == pytest.approx(1 / 2 + 1 / 4 + 1 / 8)
    assert evidence.first_losses == pytest.approx({3: 3 / 2, 4: 3 / 8, 5: 3 / 32})
    assert evidence.last_loss == pytest.approx(3 / 32)


def test_short_steps_are_confirmed_in_full_and_long_ones_are_not():
    assert descent(0.01, 50)[0].confirmed == pytest.approx(descent(0.01, 50)[0].predicted, rel=0.05)
    too_long, _ = descent(1.9, 10)
    assert too_long.confirmed < 0.0 < too_long.predicted


def test_noise_predicts_a_decrease_and_confirms_none():
    found = [descent(0.01, 400, noise=5.0, seed=seed)[0] for seed in range(10)]
    errors = [(evidence.confirmed - evidence.predicted) / evidence.error for evidence in found]
    assert max(errors) < -10.0
    # the true decrease, 1.5 of 300 predicted ones, is hidden in the error
    assert sum(abs(evidence.confirmed) < 3.0 * evidence.error for evidence in found) >= 8


def test_it_keeps_four_first_losses_and_resumes():
    evidence, value = descent(0.1, 6)
    assert len(evidence.first_losses) == 4
    check_state_is_plain(evidence.state_dict())
    resumed = Evidence(copy.deepcopy(evidence.state_dict()))
    for one in (evidence, resumed):
        one.add([value[:1], value[1:]], [value[:1], value[1:]], [value[:1] - 1.0, value[1:]], UNITS, 7.0, 9)
    for name in ("steps", "predicted", "confirmed", "error", "travel", "first_losses", "last_loss"):
        assert getattr(resumed, name) == getattr(evidence, name), name


def test_it_knows_since_when_a_tensor_has_no_hypergradient():
    evidence, one, none = Evidence({}), torch.ones(2), torch.zeros(2)
    for first, second in ((one, none), (none, one), (one, one), (one, none)):
        evidence.add([first, second], [one, one], [one, one], UNITS, 1.0, 0)
    assert evidence.last_gradient == [4, 3]


def test_half_precision_is_summed_in_float32():
    evidence = Evidence({})
    before, after = torch.zeros(10_000, dtype=torch.bfloat16), torch.full((10_000,), -1.0, dtype=torch.bfloat16)
    evidence.add([-after], [before], [after], [1.0], 1.0, 0)
    assert evidence.predicted == 10_000.0


def test_products_of_small_numbers_in_half_precision_do_not_underflow():
    evidence, small = Evidence({}), torch.full((100,), 1e-4, dtype=torch.float16)
    for _ in range(2):
        evidence.add([small], [torch.zeros_like(small)], [-small], [1.0], 1.0, 0)
    assert (evidence.predicted, evidence.confirmed) == pytest.approx((2e-6, 1e-6), rel=1e-2)


def test_travel_is_in_units():
    evidence, zeros = Evidence({}), torch.zeros(1)
    evidence.add([zeros, zeros], [zeros, zeros], [zeros + 3.0, zeros + 0.04], [1.0, 0.01], 1.0, 0)
    assert evidence.travel == pytest.approx(math.sqrt((3.0**2 + 4.0**2) / 2))


def test_an_entry_that_has_a_gradient_now_and_then_is_confirmed_when_it_has_one_again():
    """Two of four entries at a time, as weights of examples that come in two batches; the loss is their mean."""
    evidence, value = Evidence({}), torch.ones(4)
    for turn in range(6):
        gradient = torch.zeros(4)
        gradient[2 * (turn % 2) : 2 * (turn % 2) + 2] = 1.0  # of the batch, whose mean is that of two entries
        after = value - 0.1 * gradient
        evidence.add([gradient], [value], [after], [1.0], 1.0, turn)
        value = after
    # each step moves two entries by 0.1, and half of the batches have them
    assert evidence.predicted == pytest.approx(6 * 2 * 0.1 / 2)
    assert evidence.confirmed == pytest.approx(4 * 2 * 0.1 / 2)  # all but the last two


def test_shares_are_those_of_each_tensor():
    evidence, zeros = Evidence({}), torch.zeros(4)
    some = torch.tensor([1.0, 0.0, 0.0, 0.0])
    for _ in range(2):
        evidence.add([some, some[:1]], [zeros, zeros[:1]], [zeros - 1.0, zeros[:1] - 1.0], UNITS, 1.0, 0)
    assert evidence.predicted == pytest.approx(2 * (1 / 4 + 1))
    assert evidence.confirmed == pytest.approx(1 / 4 + 1)
