"""Marked outputs."""

import pytest
import torch

from lightning_ifthpo.curvature import (
    GaussNewtonOperator,
    KFACOperator,
    mark_outputs,
)
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
