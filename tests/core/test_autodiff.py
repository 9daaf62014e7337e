"""Derivatives of what is unused, frozen or linear."""

import subprocess
import sys

import pytest
import torch

from lightning_ifthpo.core.autodiff import add, differentiable, gradients_on, tangent, tangents, vjp
from tests.helpers.device import FLOAT64


def test_a_product_is_the_transposed_jacobian_times_the_cotangent():
    x = torch.tensor([1.0, 2.0], **FLOAT64, requires_grad=True)
    output = torch.stack([x[0] * x[1], x[0] ** 3])
    cotangent = torch.tensor([10.0, 1.0], **FLOAT64)
    for _ in range(2):  # the graph is kept
        (product,) = vjp([output], [x], [cotangent])
        assert product.tolist() == [10.0 * 2.0 + 3.0, 10.0 * 1.0]


def test_several_outputs_are_summed_and_a_scalar_needs_no_cotangent():
    x = torch.tensor(3.0, requires_grad=True)
    assert vjp([x**2, 2 * x], [x])[0].item() == 8.0


def test_zeros_by_structure_are_none():
    x, frozen, unused = torch.ones(2, requires_grad=True), torch.ones(2), torch.ones(2, requires_grad=True)
    product = vjp([(x * frozen).sum(), None, frozen.sum()], [frozen, x, unused])
    assert product[0] is None
    assert product[1].tolist() == [1.0, 1.0]
    assert product[2] is None
    assert vjp([None, frozen], [x]) == [None]
    assert vjp([x.sum()], [frozen]) == [None]


def test_a_product_can_be_differentiated_where_that_is_asked_for():
    x = torch.tensor(3.0, requires_grad=True)
    (slope,) = vjp([x**3], [x], create_graph=True)
    (second,) = vjp([slope], [x])
    assert second.item() == 18.0
    assert not vjp([x**3], [x])[0].requires_grad


def test_outputs_and_cotangents_come_in_pairs():
    x = torch.tensor(3.0, requires_grad=True)
    with pytest.raises(ValueError, match="shorter"):
        vjp([x, x], [x], [None])


def test_tangents_are_derivatives_along_a_direction():
    x, other = torch.tensor([1.0, 2.0], requires_grad=True), torch.ones(2)
    with tangents([x], [torch.tensor([1.0, -1.0])]):
        assert tangent((x**3).sum()).item() == 3.0 - 12.0
        assert tangent(other).tolist() == [0.0, 0.0]
    assert x.detach().tolist() == [1.0, 2.0]
    assert tangent(x).tolist() == [0.0, 0.0]


def test_gradients_are_on_wherever_the_block_stands():
    with torch.no_grad(), gradients_on():
        assert torch.is_grad_enabled()
    with torch.inference_mode(), gradients_on():
        assert not torch.is_inference_mode_enabled()
        assert (2 * torch.ones(1, requires_grad=True)).requires_grad


def test_flags_are_restored_also_after_an_error():
    frozen, free = torch.ones(1), torch.ones(1, requires_grad=True)

    def fails():
        with torch.no_grad(), differentiable([frozen, free]):
            assert (frozen + free).requires_grad
            assert frozen.requires_grad
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        fails()
    assert not frozen.requires_grad
    assert free.requires_grad


def test_none_stands_for_zero_in_a_sum():
    one, two = torch.tensor(1.0), torch.tensor(2.0)
    assert add([one, one, None, None], [two, None, two, None]) == [torch.tensor(3.0), one, two, None]


def test_tensors_and_directions_come_in_pairs():
    x = torch.ones(2, requires_grad=True)
    with pytest.raises(ValueError, match="shorter"), tangents([x, x.clone()], [torch.ones(2)]):
        pass


@pytest.mark.slow  # starts a process
def test_forward_mode_begins_without_a_warning_of_torch():
    code = "import torch; from lightning_ifthpo.core.autodiff import tangent, tangents\nx = torch.ones(2)\n"
    code += "with tangents([x], [x + 1]): print(tangent(x * x).tolist())"
    run = subprocess.run(
        [sys.executable, "-W", "error::FutureWarning", "-c", code], capture_output=True, text=True, check=False
    )
    assert (run.stdout.strip(), run.stderr) == ("[4.0, 4.0]", "")
