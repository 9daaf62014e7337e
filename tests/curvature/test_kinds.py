"""Curvatures by name."""

import pytest
import torch

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


@pytest.mark.parametrize("curvature", ["kfac", "gradient_outer_product"])
def test_curvatures_that_do_not_add_up_are_refused(curvature):
    w = torch.ones(2, requires_grad=True)
    with pytest.raises(ValueError, match=f"curvature='{curvature}' needs all examples in one process"):
        curvature_operator(curvature, lambda: w.sum(), [w], all_reduce=torch.clone)
