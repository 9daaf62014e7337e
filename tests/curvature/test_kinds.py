"""Curvatures by name."""

import pytest
import torch

from lightning_ifthpo.core.loss import Loss
from lightning_ifthpo.curvature import (
    FiniteDifferenceOperator,
    curvature_operator,
)


def test_curvature_by_name():
    w = torch.tensor([1.0, 2.0], requires_grad=True)
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
