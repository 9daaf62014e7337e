"""Nyström where it is exact."""

import pytest
import torch

from lightning_ifthpo.curvature import MatrixOperator
from lightning_ifthpo.solvers import (
    LinearSystem,
    Nystrom,
)
from tests.helpers.device import DEVICE, WHERE, randn, within
from tests.helpers.problems import relative_error, spd_matrix
from tests.helpers.systems import right_hand_side


@pytest.mark.parametrize("damping", [1e-2, torch.logspace(-3, 0, 12, **WHERE)], ids=["number", "vector"])
@pytest.mark.parametrize("rank", [3, 12, 40])
def test_nystrom_inverts_what_it_has_seen(rank, damping):
    """At full rank the exact inverse; below, exact for a matrix of that rank."""
    spectrum = (
        torch.tensor([9.0, 4.0, 1.0] + 9 * [0.0], device=DEVICE)
        if rank == 3
        else torch.arange(1.0, 13.0, device=DEVICE)
    )
    basis = torch.linalg.qr(randn(12, 12, seed=4)).Q
    matrix, b = basis @ torch.diag(spectrum.to(**WHERE)) @ basis.T, right_hand_side(12)
    matrix = (matrix + matrix.T) / 2
    result = Nystrom(rank=rank, damping=damping).solve(MatrixOperator(matrix), b)
    wanted = torch.linalg.solve(matrix + torch.diag(torch.as_tensor(damping, **WHERE).expand(12)), b)
    assert relative_error(result.x, wanted) < within(1e-9)
    assert (result.products, result.extra_products) == (min(rank, 12), 1)


def test_nystrom_draws_its_directions_from_its_seed():
    operator, b = MatrixOperator(spd_matrix(20, 100.0)), right_hand_side(20)
    first, again, other = (Nystrom(rank=3, damping=1.0, seed=seed).solve(operator, b).x for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


def test_nystrom_refuses_to_divide_by_what_it_does_not_see():
    with pytest.raises(ValueError, match=r"Nystrom\(rank=3\) needs damping > 0 on 6 parameters"):
        Nystrom(rank=3).solve(MatrixOperator(spd_matrix(6, 10.0)), right_hand_side(6))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Nystrom(rank=0), "rank to be an integer >= 1"),
    ],
)
def test_options_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("damping", [0.5, torch.linspace(0.1, 1.0, 6, **WHERE)], ids=["number", "vector"])
def test_a_preconditioner_makes_what_it_has_seen_equal_and_leaves_the_rest(damping):
    """In units of the damping, S(A + δ)S = I + SAS: the r eigenvalues that it has seen become the smallest of them."""
    basis = torch.linalg.qr(randn(6, 6, seed=4)).Q
    delta = torch.as_tensor(damping, **WHERE).expand(6)
    scaled = basis @ torch.diag(torch.tensor([9.0, 4.0, 2.0, 0.0, 0.0, 0.0], **WHERE)) @ basis.T  # SAS
    matrix = delta.sqrt()[:, None] * scaled * delta.sqrt()
    system = LinearSystem(MatrixOperator((matrix + matrix.T) / 2), damping)
    low_rank = Nystrom(rank=3).approximation(system)
    inverse = torch.stack([low_rank.precondition(row) for row in torch.eye(6, **WHERE)], dim=1)
    wanted = torch.tensor([1.0, 1.0, 1.0, 3.0, 3.0, 3.0], **WHERE)
    found = torch.linalg.eigvals(inverse @ (matrix + torch.diag(delta))).real.sort().values
    assert torch.allclose(found, wanted, rtol=within(1e-9))
    assert torch.allclose(low_rank.values, torch.tensor([9.0, 4.0, 2.0], **WHERE), rtol=within(1e-9))


@pytest.mark.parametrize("rank", [6, 9])
def test_without_damping_all_directions_give_the_inverse(rank):
    matrix, b = spd_matrix(6, 10.0), right_hand_side(6)
    result = Nystrom(rank=rank).solve(MatrixOperator(matrix), b)
    assert relative_error(result.x, torch.linalg.solve(matrix, b)) < within(1e-12)
    assert result.products == 6
