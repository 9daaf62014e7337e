"""The Krylov basis: orthonormal, honest at its end, and the operator as a small matrix in it."""

import math

import pytest
import torch

from lightning_ifthpo.curvature import MatrixOperator
from lightning_ifthpo.spectrum.basis import KrylovBasis, length_of, random_vector
from tests.helpers.device import DEVICE, WHERE, within
from tests.helpers.problems import relative_error, spd_matrix


def basis_of(matrix, products, start=None):
    basis = KrylovBasis(MatrixOperator(matrix), start, torch.Generator().manual_seed(0))
    for _ in range(products):
        basis.extend()
    return basis


def test_its_vectors_are_orthonormal_however_ill_conditioned_the_operator_is():
    """Without reorthogonalization λ_max would appear several times."""
    basis = basis_of(spd_matrix(40, 1e6), 30)
    vectors = basis.combine(torch.eye(30, dtype=torch.float64, device=DEVICE))
    assert vectors.shape == (30, 40)
    assert torch.allclose(vectors @ vectors.T, torch.eye(30, **WHERE), atol=within(1e-14))
    assert (basis.products, basis.finite, basis.exhausted, basis.fresh) == (30, True, False, 30)


def test_ritz_values_are_those_of_the_operator_in_the_basis():
    matrix = spd_matrix(20, 100.0, signs=True)
    basis = basis_of(matrix, 8)
    ritz, vectors = basis.ritz(), basis.combine(torch.eye(8, dtype=torch.float64, device=DEVICE))
    wanted = torch.linalg.eigvalsh(vectors @ matrix @ vectors.T).cpu()
    assert relative_error(ritz.values, wanted) < within(1e-13)
    assert [part.shape for part in (ritz.values, ritz.bounds, ritz.weights)] == [(8,)] * 3
    assert ritz.coefficients.shape == (8, 8)
    assert float(ritz.weights.sum()) == pytest.approx(1.0)


def test_each_bound_is_the_residual_of_its_vector():
    matrix = spd_matrix(20, 100.0, signs=True)
    basis = basis_of(matrix, 8)
    ritz = basis.ritz()
    vectors = basis.combine(ritz.coefficients)
    residuals = (vectors @ matrix - ritz.values.to(**WHERE)[:, None] * vectors).norm(dim=1)
    assert residuals.tolist() == pytest.approx(ritz.bounds.tolist(), rel=within(1e-9), abs=within(1e-12))


def test_an_invariant_space_is_noticed_and_left():
    """Two eigenvectors span it; the third vector is a random one outside."""
    matrix, start = (
        torch.diag(torch.arange(1.0, 6.0, device=DEVICE)).to(**WHERE),
        torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0], **WHERE),
    )
    basis = basis_of(matrix, 2, start)
    assert basis.exhausted
    assert basis.ritz().values.tolist() == pytest.approx([1.0, 2.0])
    assert float(basis.ritz().bounds.max()) <= within(1e-14)
    basis.extend()
    assert (basis.exhausted, basis.fresh) == (False, 1)
    assert 3.0 <= float(basis.ritz(2).values[0]) <= 5.0


def test_a_nan_is_told_and_makes_nothing_of_the_rest():
    operator = MatrixOperator(torch.eye(3, device=DEVICE))
    operator.matrix = torch.full((3, 3), torch.nan, device=DEVICE)
    basis = KrylovBasis(operator, None, torch.Generator().manual_seed(0))
    basis.extend()
    assert not basis.finite
    assert bool(basis.ritz().values.isnan().all())


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_lengths_neither_vanish_nor_overflow(scale):
    assert float(length_of(torch.tensor([3.0, -4.0], device=DEVICE) * scale)) == pytest.approx(5.0 * scale)
    assert float(length_of(torch.zeros(2, device=DEVICE))) == 0.0
    assert math.isnan(length_of(torch.tensor([math.nan, 1.0], device=DEVICE)))


def test_random_vectors_come_from_their_generator_in_the_dtype_of_the_operator():
    operator = MatrixOperator(torch.eye(5, **WHERE))
    first, again, other = (random_vector(operator, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert (first.shape, first.dtype, first.device) == ((5,), operator.dtype, operator.device)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_ritz_values_of_some_of_the_vectors_are_those_of_the_operator_in_them():
    matrix = spd_matrix(20, 100.0, signs=True)
    basis = basis_of(matrix, 8)
    vectors = basis.combine(torch.eye(8, dtype=torch.float64, device=DEVICE))
    for first, last in ((0, 5), (2, 6), (3, None)):
        part = vectors[first:last]
        wanted = torch.linalg.eigvalsh(part @ matrix @ part.T).cpu()
        assert relative_error(basis.ritz(first, last).values, wanted) < within(1e-13)
