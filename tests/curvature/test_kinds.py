"""Curvatures by name."""

from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_ifthpo.curvature import (
    Curvature,
    FiniteDifferenceOperator,
    GaussNewtonOperator,
    GradientOuterProductOperator,
    HessianOperator,
    KFACOperator,
    LossCurvature,
    SummedOperator,
    curvature_operator,
    mark_outputs,
)
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
    share = curvature_operator(name, lambda: loss() / 2, parameters, all_reduce=both_halves)
    assert isinstance(share, SummedOperator)
    v = randn(whole.size, seed=1)
    assert torch.allclose(share.matvec(v), whole.matvec(v), rtol=10 * DIFFERENCES)


def test_curvature_by_name():
    w = torch.tensor([1.0, 2.0], requires_grad=True, device=DEVICE)
    operator = curvature_operator("finite_difference", lambda: w.prod(), [w])
    assert isinstance(operator, FiniteDifferenceOperator)
    with pytest.raises(ValueError, match=r"expected curvature to be one of .*got 'fisher'"):
        curvature_operator("fisher", lambda: w.prod(), [w])


@pytest.mark.parametrize("curvature", ["kfac", "gradient_outer_product"])
def test_curvatures_that_do_not_add_up_are_refused(curvature):
    w = torch.ones(2, requires_grad=True, device=DEVICE)
    with pytest.raises(ValueError, match=f"curvature='{curvature}' needs all examples in one process"):
        curvature_operator(curvature, lambda: w.sum(), [w], all_reduce=torch.clone)
