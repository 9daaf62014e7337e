"""The graph of one evaluation of a loss."""

import pytest
import torch

from lightning_ifthpo.core.graph import LossGraph
from lightning_ifthpo.core.space import ParameterSpace
from tests.helpers.device import FLOAT64
from tests.helpers.problems import spd_matrix


def quadratic_graph(matrix, weight, hyperparameter):
    """L = h wᵀAw/2, with gradient hAw, Hessian hA and mixed derivative Aw."""
    return LossGraph(hyperparameter * weight @ matrix @ weight / 2, ParameterSpace([weight]))


def test_products_are_those_of_the_closed_form_and_can_be_repeated():
    matrix = spd_matrix(4, 10.0, dtype=torch.float64)
    weight = torch.linspace(-1, 1, 4, **FLOAT64).requires_grad_()
    hyperparameter = torch.tensor(3.0, **FLOAT64, requires_grad=True)
    graph, v = quadratic_graph(matrix, weight, hyperparameter), torch.linspace(0, 1, 4, **FLOAT64)
    for _ in range(2):
        assert torch.allclose(graph.gradient, 3 * matrix @ weight.detach(), rtol=1e-14)
        assert torch.allclose(graph.hessian_product(v), 3 * matrix @ v, rtol=1e-14)
        (mixed,) = graph.mixed_product(v, [hyperparameter])
        assert mixed.item() == pytest.approx((v @ matrix @ weight).item(), rel=1e-14)
    assert not graph.gradient.requires_grad
    assert weight.grad is None


def test_what_enters_linearly_or_not_at_all_has_zero_blocks():
    curved, linear = torch.tensor([2.0], requires_grad=True), torch.tensor([3.0], requires_grad=True)
    frozen, unused, other = torch.ones(1), torch.ones(1, requires_grad=True), torch.ones((), requires_grad=True)
    space = ParameterSpace([curved, linear, frozen, unused])
    graph = LossGraph((curved**2 + linear + frozen).sum(), space)
    assert graph.gradient.tolist() == [4.0, 1.0, 0.0, 0.0]
    assert graph.hessian_product(torch.ones(4)).tolist() == [2.0, 0.0, 0.0, 0.0]
    assert graph.mixed_product(torch.ones(4), [other]) == [None]
