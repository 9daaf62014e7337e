"""Curvatures by name."""

from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_ifthpo import Loss
from lightning_ifthpo.curvature import (
    Curvature,
    FiniteDifferenceOperator,
    GaussNewtonOperator,
    GradientOuterProductOperator,
    HessianOperator,
    KFACOperator,
    curvature_operator,
    mark_outputs,
)
from lightning_ifthpo.curvature.kinds import LossCurvature
from tests.checks import check_knows_its_loss, check_leaves_weights_untouched, check_symmetric
from tests.helpers.device import DEVICE, WHERE, randn
from tests.helpers.implementations import DIFFERENCES, EXACT, both_halves
from tests.helpers.networks import batch

KINDS = {
    "hessian": HessianOperator,
    "gauss_newton": GaussNewtonOperator,
    "gradient_outer_product": GradientOuterProductOperator,
    "kfac": KFACOperator,
    "finite_difference": FiniteDifferenceOperator,
}
MEASURABLE = get_args(LossCurvature)


def softmax_with_temperature():
    x, y = batch()
    net, temperature = nn.Linear(4, 3).to(**WHERE), torch.tensor([0.5], **WHERE, requires_grad=True)
    return lambda: F.cross_entropy(mark_outputs(net(x) * temperature.exp()), y), list(net.parameters()), temperature


def test_all_names_are_known():
    measurable, approximate = get_args(Curvature)
    assert {*get_args(measurable), *get_args(approximate)} == KINDS.keys()


@pytest.mark.parametrize("name", KINDS)
def test_a_name_stands_for_its_operator(name):
    loss, parameters, temperature = softmax_with_temperature()
    operator = curvature_operator(name, loss, parameters)
    tolerance = DIFFERENCES if name == "finite_difference" else EXACT
    assert type(operator) is KINDS[name]
    check_symmetric(operator, tolerance)
    check_knows_its_loss(operator, loss(), parameters, temperature, tolerance)
    check_leaves_weights_untouched(lambda: curvature_operator(name, loss, parameters), parameters)


@pytest.mark.parametrize("name", MEASURABLE)
def test_shares_of_several_processes_are_summed(name):
    loss, parameters, _ = softmax_with_temperature()
    whole = curvature_operator(name, loss, parameters)
    share = curvature_operator(name, Loss(loss, parameters, share=0.5, all_reduce=both_halves), parameters)
    v = randn(whole.size, seed=1)
    assert torch.allclose(share.matvec(v), whole.matvec(v), rtol=10 * DIFFERENCES)


def test_curvature_by_name():
    w = torch.tensor([1.0, 2.0], requires_grad=True, device=DEVICE)
    operator = curvature_operator("finite_difference", lambda: w.prod(), [w])
    assert isinstance(operator, FiniteDifferenceOperator)
    with pytest.raises(ValueError, match=r"expected curvature to be one of .*got 'fisher'"):
        curvature_operator("fisher", lambda: w.prod(), [w])


@pytest.mark.parametrize("options", [{"all_reduce": torch.clone}, {"scale": 2.0}], ids=["processes", "loss scale"])
def test_kfac_of_a_part_of_a_loss_is_refused(options):
    w = torch.ones(2, requires_grad=True)
    loss = Loss(lambda: w.sum(), [w], **options)
    with pytest.raises(ValueError, match="curvature='kfac' needs all examples in one process"):
        curvature_operator("kfac", loss, [w])


def test_the_outer_product_is_that_of_the_gradient_summed_over_processes():
    w = torch.tensor([1.0, 2.0], requires_grad=True)
    loss = Loss(lambda: w.square().sum() / 2, [w], all_reduce=lambda part: 3 * part)  # three equal processes
    g = 3 * w.detach()
    operator = curvature_operator("gradient_outer_product", loss, [w])
    assert torch.equal(operator.to_dense(), torch.outer(g, g))
