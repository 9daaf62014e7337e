"""Marked outputs."""

import pytest
import torch

from lightning_ifthpo.curvature import (
    GaussNewtonOperator,
    KFACOperator,
    mark_outputs,
)
from lightning_ifthpo.curvature.outputs import checked_outputs, cut_at
from tests.helpers.device import DEVICE, WHERE
from tests.helpers.networks import two_layers


def test_gauss_newton_without_outputs_says_what_to_do():
    weight = torch.ones(2, requires_grad=True, device=DEVICE)
    with pytest.raises(ValueError, match="call mark_outputs"):
        GaussNewtonOperator(lambda: weight.square().sum(), [weight])


def test_gauss_newton_refuses_an_output_without_history():
    weight = torch.ones(2, requires_grad=True, device=DEVICE)
    with pytest.raises(ValueError, match="does not depend on any parameter"):
        GaussNewtonOperator(lambda: (weight.square().sum(), torch.ones(2, device=DEVICE)), [weight])


@pytest.mark.parametrize("operator", [GaussNewtonOperator, KFACOperator])
def test_outputs_marked_twice_on_one_way_are_refused(operator):
    net = two_layers()

    def loss():
        return mark_outputs(2.0 * mark_outputs(net(torch.ones(3, 4, **WHERE)))).square().sum()

    with pytest.raises(ValueError, match="depends on another one; mark only the last"):
        operator(loss, list(net.parameters()))


def test_outputs_that_do_not_depend_on_each_other_are_accepted():
    w = torch.ones(4, requires_grad=True, device=DEVICE)
    outputs = [*(2.0 * w).split(2), 3.0 * w]  # two of one node, and one of another
    assert checked_outputs(outputs) is outputs
    assert checked_outputs(outputs[:1]) == outputs[:1]


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1], [0, 2, 1]], ids=str)
def test_an_output_that_comes_after_the_one_it_depends_on_is_found_among_three(order):
    w = torch.ones(4, requires_grad=True, device=DEVICE)
    first = 2.0 * w
    outputs = [first, first.square(), 3.0 * w]
    with pytest.raises(ValueError, match="depends on another one"):
        checked_outputs([outputs[index] for index in order])


def test_a_cut_stops_gradients_behind_the_outputs_and_is_taken_away_again():
    w = torch.tensor([1.0, 2.0], requires_grad=True, device=DEVICE)
    output = 3.0 * w
    loss = output.square().sum() + w.sum()
    slopes = []
    for cut in ([output], []):
        with cut_at(cut):
            slopes.append(torch.autograd.grad(loss, [output, w], retain_graph=True))
    slopes.append(torch.autograd.grad(loss, [output, w]))
    assert [slope.tolist() for slope, _ in slopes] == [[6.0, 12.0]] * 3
    assert [slope.tolist() for _, slope in slopes] == [[1.0, 1.0], [19.0, 37.0], [19.0, 37.0]]
