"""Curvature of a loss that several processes share; the other process is played."""

import pytest
import torch

from lightning_ifthpo import Loss
from lightning_ifthpo.curvature import DistributedOperator, HessianOperator, MatrixOperator
from tests.helpers.device import DEVICE

OTHER_HESSIAN, OTHER_GRADIENT = (
    torch.diag(torch.tensor([10.0, 20.0], device=DEVICE)),
    torch.tensor([100.0, 200.0], device=DEVICE),
)


def test_a_product_takes_one_collective():
    """w₁³ + w₂³ here, and a loss with another Hessian there."""
    w, sums = torch.tensor([1.0, 2.0], requires_grad=True, device=DEVICE), []

    def all_reduce(part):
        sums.append(part.shape)
        return part + OTHER_HESSIAN @ v

    v = torch.tensor([1.0, -1.0], device=DEVICE)
    operator = HessianOperator(Loss(lambda: (w**3).sum(), [w], all_reduce=all_reduce), [w])
    assert operator.matvec(v).tolist() == [6.0 + 10.0, -12.0 - 20.0]
    assert sums == [(2,)]


def test_loss_and_gradient_are_sums_that_are_asked_for_once():
    w, calls = torch.tensor([1.0, 2.0], requires_grad=True, device=DEVICE), []

    def all_reduce(part):
        calls.append(1)
        return part + (OTHER_GRADIENT if part.ndim else 5.0)

    operator = HessianOperator(Loss(lambda: (w**3).sum(), [w], all_reduce=all_reduce), [w])
    for _ in range(2):
        assert operator.gradient.tolist() == [103.0, 212.0]
        assert operator.loss.item() == 14.0
    assert len(calls) == 2


def test_a_mixed_product_is_summed_by_one_collective():
    w, h = (
        torch.tensor([1.0, 2.0], requires_grad=True, device=DEVICE),
        torch.tensor(3.0, requires_grad=True, device=DEVICE),
    )
    sums = []

    def all_reduce(part):
        sums.append(part.numel())
        return 2 * part

    operator = HessianOperator(Loss(lambda: h * (w**2).sum(), [w], all_reduce=all_reduce), [w])
    (mixed,) = operator.mixed_product(torch.tensor([1.0, 1.0], device=DEVICE), [h])
    assert mixed.item() == 2 * (2.0 + 4.0)
    assert sums == [2]  # whether anybody has a derivative, and the derivative


@pytest.mark.parametrize(("others", "wanted"), [(0.0, None), (1.0, [0.5, 0.5])], ids=["nobody", "another process"])
def test_a_part_that_is_missing_here_may_exist_elsewhere(others, wanted):
    like = [torch.ones(2, device=DEVICE), torch.ones(1, dtype=torch.float64, device=DEVICE)]

    def all_reduce(part):
        assert part.shape == (2 + 3,)
        return part + torch.tensor([others, 1.0, 0.5, 0.5, 1.0], device=DEVICE)

    loss = Loss(lambda: like[0].sum(), like, all_reduce=all_reduce)
    parts = [None, torch.tensor([2.0], dtype=torch.float64, device=DEVICE)]
    missing, present = loss.combine_list(parts, like)
    assert (None if missing is None else missing.tolist()) == wanted
    assert present.tolist() == [3.0]
    assert present.dtype == torch.float64


def test_operators_of_several_processes_are_summed_with_their_weights():
    """The other process is played: it has the same matrix, and the rest of the weight."""
    operator = DistributedOperator(MatrixOperator(torch.eye(2)), 0.25, lambda part: part + 0.75 * v)
    v = torch.tensor([1.0, -1.0])
    assert torch.equal(operator.matvec(v), v)
    assert (operator.size, operator.dtype, operator.device) == (2, torch.float32, torch.device("cpu"))
