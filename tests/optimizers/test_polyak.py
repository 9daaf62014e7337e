"""The optimizer of hyperparameters without a learning rate."""

import copy
import math

import pytest
import torch

from lightning_ifthpo.optimizers import PolyakRMSprop
from tests.checks import check_state_is_plain


def tensors(*sizes):
    return [torch.zeros(size, dtype=torch.float64) for size in sizes]


def steps(optimizer, parameters, gradients, losses):
    """Makes steps and returns how far each moved, as one vector for each step."""
    moves = []
    for gradient, loss in zip(gradients, losses, strict=True):
        before = [parameter.clone() for parameter in parameters]
        for parameter, part in zip(parameters, gradient, strict=True):
            parameter.grad = part
        optimizer.step(None if loss is None else lambda loss=loss: loss)
        moves.append(torch.cat([(p - b).flatten() for p, b in zip(parameters, before, strict=True)]))
    return moves


def reference(gradients, losses, horizon, travel, decrease, unit):
    """The rule of the docstring, with plain numbers: means that are divided by the sum of their weights."""

    def mean(values, memory):
        weights = [memory ** (len(values) - 1 - i) for i in range(len(values))]
        return sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)

    moves, predicted, touched = [], [], []
    for k, gradient in enumerate(gradients):
        size = mean([g**2 for g in gradients[: k + 1]], 0.99).sqrt()
        direction = torch.where(gradient == 0.0, 0.0, unit * gradient / size)
        touched.append(float((gradient != 0.0).double().mean()))
        predicted.append(touched[-1] * float(gradient @ direction))
        longest = travel / horizon / math.sqrt(mean(touched, 0.9)) * min(1.0, (k + 1) / horizon)
        polyak = decrease / horizon * mean([abs(loss) for loss in losses[: k + 1]], 0.9) / mean(predicted, 0.9)
        moves.append(-min(longest, polyak) * direction)
    return moves


@pytest.mark.parametrize("options", [{}, {"horizon": 5.0}, {"travel": 0.5}, {"decrease": 0.01}, {"unit": 0.1}], ids=str)
def test_it_follows_its_definition(options):
    options = {"horizon": 3.0, "travel": 4.0, "decrease": 0.5, "unit": 1.0} | options
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(12, 5, dtype=torch.float64, generator=generator)
    gradients[torch.rand(12, 5, generator=generator) < 0.4] = 0.0
    losses = torch.rand(12, generator=generator).tolist()
    parameters = tensors(2, 3)
    moves = steps(PolyakRMSprop(parameters, **options), parameters, [g.split([2, 3]) for g in gradients], losses)
    for move, expected in zip(moves, reference(gradients, losses, **options), strict=True):
        torch.testing.assert_close(move, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("scale", [1e-30, 1e-8, 1.0, 1e8])
def test_the_travel_does_not_depend_on_the_scale_of_gradients(scale):
    parameters = tensors(4)
    gradients = [[torch.full((4,), scale, dtype=torch.float64)]] * 60
    steps(PolyakRMSprop(parameters, horizon=20, travel=2.0), parameters, gradients, [None] * 60)
    # a ramp over the first horizon, then the full pace
    torch.testing.assert_close(parameters[0], torch.full((4,), -2.0 * (2.0 + 10.5 / 20), dtype=torch.float64))


def test_the_predicted_decrease_stays_a_fraction_of_the_loss():
    """On a steep valley the pace follows from the loss and not from the travel."""
    parameters = tensors(1)
    gradient = torch.tensor([50.0], dtype=torch.float64)
    moves = steps(PolyakRMSprop(parameters, horizon=10, decrease=0.3), parameters, [[gradient]] * 40, [2.0] * 40)
    predicted = -sum(float(move @ gradient) for move in moves[-10:])
    assert predicted == pytest.approx(0.3 * 2.0)


def test_entries_that_seldom_have_a_gradient_travel_no_less():
    """Each of the weights of 100 examples has a gradient in every tenth step."""
    parameters = tensors(100)
    gradients = [torch.zeros(100, dtype=torch.float64) for _ in range(400)]
    for k, gradient in enumerate(gradients):
        gradient[10 * (k % 10) : 10 * (k % 10) + 10] = 1.0
    steps(PolyakRMSprop(parameters, horizon=20, travel=1.0), parameters, [[g] for g in gradients], [None] * 400)
    assert parameters[0].mean() == pytest.approx(-400 / 20, rel=0.2)


@pytest.mark.parametrize(("value", "unit"), [([0.0, 0.0], 1.0), ([0.03, 0.04], 0.05 / math.sqrt(2)), ([9.0, 9.0], 1.0)])
def test_the_unit_of_a_plain_tensor_is_its_root_mean_square_and_at_most_one(value, unit):
    parameter = torch.tensor(value, dtype=torch.float64)
    (move,) = steps(
        PolyakRMSprop([parameter], horizon=1, travel=1.0), [parameter], [[torch.ones(2, dtype=torch.float64)]], [None]
    )
    torch.testing.assert_close(move, torch.full((2,), -unit, dtype=torch.float64))


def test_groups_have_units_of_their_own_and_tensors_without_a_gradient_stay():
    first, second, third = tensors(1, 1, 1)
    optimizer = PolyakRMSprop(
        [{"params": [first, third], "unit": 2.0}, {"params": [second]}], horizon=1, travel=1.0, unit=3.0
    )
    first.grad = second.grad = torch.ones(1, dtype=torch.float64)
    optimizer.step()
    assert (first.item(), second.item(), third.item()) == pytest.approx((-2.0, -3.0, 0.0))
    first.grad = second.grad = None
    assert optimizer.step(lambda: 5.0) == 5.0
    assert (first.item(), second.item()) == pytest.approx((-2.0, -3.0))


def test_a_loss_of_zero_and_a_gradient_of_zero_move_nothing():
    parameters = tensors(2)
    optimizer = PolyakRMSprop(parameters)
    moves = steps(
        optimizer, parameters, [[torch.zeros(2, dtype=torch.float64)], [torch.ones(2, dtype=torch.float64)]], [1.0, 0.0]
    )
    assert not bool(moves[0].any())
    assert bool(parameters[0].isfinite().all())


def test_it_resumes():
    parameters, others = tensors(3), tensors(3)
    generator = torch.Generator().manual_seed(0)
    gradients = [[g] for g in torch.randn(10, 3, dtype=torch.float64, generator=generator)]
    optimizer, resumed = PolyakRMSprop(parameters), PolyakRMSprop(others)
    steps(optimizer, parameters, gradients[:5], [1.0] * 5)
    check_state_is_plain(optimizer.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    others[0].copy_(parameters[0])
    for one, its in ((optimizer, parameters), (resumed, others)):
        steps(one, its, gradients[5:], [1.0] * 5)
    assert torch.equal(parameters[0], others[0])


@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-30, 1e-19, 1e-10])
def test_squares_that_underflow_make_no_long_step(size):
    parameter = torch.zeros(2)
    moves = steps(PolyakRMSprop([parameter], horizon=1, travel=1.0), [parameter], [[torch.full((2,), size)]], [None])
    assert float(moves[0].abs().max()) <= 1.0


@pytest.mark.parametrize("gap", [None, math.nan, math.inf])
def test_a_loss_that_is_missing_or_not_finite_leaves_the_mean_as_it_is(gap):
    gradient = [torch.tensor([50.0], dtype=torch.float64)]
    one, other = tensors(1), tensors(1)
    moves = steps(PolyakRMSprop(one), one, [gradient] * 30, [2.0] * 30)
    others = steps(PolyakRMSprop(other), other, [gradient] * 30, [2.0] * 15 + [gap] * 5 + [2.0] * 10)
    torch.testing.assert_close(torch.cat(moves), torch.cat(others))


def test_gradients_whose_squares_overflow_leave_numbers():
    (parameter,) = values = [torch.zeros(2)]
    steps(PolyakRMSprop(values), values, [[torch.full((2,), 1e30)]] * 3, [1.0] * 3)
    assert bool(parameter.isfinite().all())


def test_a_copy_makes_the_same_steps():
    parameters = tensors(2)
    optimizer = PolyakRMSprop(parameters, horizon=3, travel=0.7, decrease=0.2)
    steps(optimizer, parameters, [[torch.ones(2, dtype=torch.float64)]], [1.0])
    twin = copy.deepcopy(optimizer)
    twins = twin.param_groups[0]["params"]
    for one, its in ((optimizer, parameters), (twin, twins)):
        steps(one, its, [[torch.ones(2, dtype=torch.float64)]], [1.0])
    assert torch.equal(parameters[0], twins[0])


def test_the_unit_of_a_group_is_checked():
    with pytest.raises(ValueError, match="unit"):
        PolyakRMSprop([{"params": tensors(1), "unit": -1.0}])


@pytest.mark.parametrize("option", ["horizon", "travel", "decrease", "unit"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan, "1"])
def test_a_value_out_of_range_is_refused(option, value):
    with pytest.raises(ValueError, match=option):
        PolyakRMSprop(tensors(1), **{option: value})
