"""Hearing of products."""

import pytest
import torch

from lightning_ifthpo.curvature import AverageOperator, DistributedOperator, MatrixOperator
from lightning_ifthpo.curvature.base import CurvatureOperator
from lightning_ifthpo.curvature.counting import hearing_products
from lightning_ifthpo.solvers import ConjugateGradient
from lightning_ifthpo.spectrum import lanczos

MATRIX = MatrixOperator(torch.diag(torch.tensor([1.0, 2.0, 3.0])))


@pytest.mark.parametrize(
    "operator",
    [
        MATRIX,
        MATRIX.damped(1.0),
        MATRIX.preconditioned(torch.ones(3)),
        AverageOperator([lambda: MATRIX, lambda: MATRIX], weights=[1, 2]).damped(1.0),
        DistributedOperator(MATRIX, 1.0, all_reduce=lambda part: part),
    ],
    ids=["plain", "damped", "preconditioned", "average", "distributed"],
)
def test_a_product_is_heard_once_whatever_it_consists_of(operator):
    heard = []
    with hearing_products(lambda: heard.append(operator)):
        operator.matvec(torch.ones(3))
        operator.matvec(torch.ones(3))
    operator.matvec(torch.ones(3))
    assert len(heard) == 2


def test_what_is_heard_is_what_solvers_and_spectrum_code_count():
    heard = []
    with hearing_products(lambda: heard.append(1)):
        result = ConjugateGradient(max_iterations=2, damping=0.1).solve(MATRIX, torch.ones(3))
        assert len(heard) == result.products + result.extra_products
        heard.clear()
        assert len(heard) == 0
        assert lanczos(MATRIX).products == len(heard)


def test_the_listener_inside_takes_the_place_of_the_one_outside():
    outside, inside = [], []
    with hearing_products(lambda: outside.append(1)):
        with hearing_products(lambda: inside.append(1)):
            MATRIX.matvec(torch.ones(3))
        MATRIX.matvec(torch.ones(3))
    assert (len(outside), len(inside)) == (1, 1)


def test_a_product_that_fails_is_not_heard_and_the_next_one_is():
    class Failing(CurvatureOperator):
        size, dtype, device = 3, torch.float32, torch.device("cpu")

        def _product(self, v):
            raise RuntimeError("out of memory")

    heard = []
    with hearing_products(lambda: heard.append(1)):
        with pytest.raises(RuntimeError, match="out of memory"):
            Failing().matvec(torch.ones(3))
        assert not heard
        MATRIX.matvec(torch.ones(3))
        assert len(heard) == 1
