"""A loss with its graph, and what is said of functions that are none."""

import pytest
import torch

from lightning_ifthpo.core.loss import LossGraph, check_loss, loss_and_outputs
from tests.helpers.device import FLOAT64
from tests.helpers.problems import spd_matrix


def quadratic_graph(matrix, weight, hyperparameter):
    """L = h wᵀAw/2, with gradient hAw, Hessian hA and mixed derivative Aw."""
    return LossGraph(hyperparameter * weight @ matrix @ weight / 2, [weight])


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
    graph = LossGraph((curved**2 + linear + frozen).sum(), [curved, linear, frozen, unused])
    assert graph.gradient.tolist() == [4.0, 1.0, 0.0, 0.0]
    assert graph.hessian_product(torch.ones(4)).tolist() == [2.0, 0.0, 0.0, 0.0]
    assert graph.mixed_product(torch.ones(4), [other]) == [None]


def test_a_loss_may_bring_one_output_or_several():
    loss, output = torch.ones(()), torch.ones(2)
    assert loss_and_outputs(loss)[0] is loss
    assert len(loss_and_outputs(loss)[1]) == 0
    assert loss_and_outputs((loss, output)) == (loss, [output])
    assert loss_and_outputs((loss, [output, output]))[1] == [output, output]


@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        (1.0, TypeError, "the loss: expected a scalar tensor, got float"),
        (None, TypeError, "expected a scalar tensor, got NoneType"),
        (torch.ones(2, requires_grad=True), ValueError, r"expected a scalar, got shape \(2,\); take its mean or sum"),
        (torch.tensor(1), TypeError, "expected a real floating-point tensor, got torch.int64"),
        (torch.tensor(1j, requires_grad=True), TypeError, "got torch.complex64"),
        (torch.tensor(1.0), ValueError, r"the loss is detached.*Look for .detach\(\)"),
    ],
    ids=["float", "nothing", "vector", "integer", "complex", "detached"],
)
def test_what_is_no_loss_is_said_in_words(loss, error, message):
    with pytest.raises(error, match=message):
        check_loss(loss, "the loss")


def test_a_scalar_of_any_number_of_dimensions_is_a_loss():
    check_loss(torch.ones(1, 1, requires_grad=True), "the loss")
