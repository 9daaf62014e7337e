"""Both ends of a spectrum, against known spectra and dense eigenvalues."""

import pytest
import torch

from lightning_ifthpo.curvature import MatrixOperator
from lightning_ifthpo.spectrum import lanczos, power_iteration
from tests.helpers.device import DEVICE, FLOAT64, randn
from tests.helpers.problems import spd_matrix


def test_both_ends_of_nearly_equal_magnitude():
    """A power iteration returns anything between −0.92 and 0.85 here, "converged"."""
    values = torch.cat(
        [torch.tensor([1.001, -1.002], device=DEVICE), torch.linspace(-0.3, 0.3, 200, device=DEVICE)]
    ).to(**FLOAT64)
    result = lanczos(MatrixOperator(torch.diag(values)), rtol=1e-8)
    assert result.converged
    assert result.largest.item() == pytest.approx(1.001, abs=1e-6)
    assert result.smallest.item() == pytest.approx(-1.002, abs=1e-6)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("scale", [1e-10, 1.0, 1e10])
def test_dense_reference_and_bounds(k, scale):
    matrix = scale * spd_matrix(60, 1e3, signs=True, dtype=torch.float64)
    values = torch.linalg.eigvalsh(matrix).cpu()
    for max_iterations in (5, 12, 60):
        result = lanczos(MatrixOperator(matrix), k=k, max_iterations=max_iterations, rtol=1e-9)
        for found, bounds in ((result.largest, result.largest_bounds), (result.smallest, result.smallest_bounds)):
            distance = (found[:, None] - values[None]).abs().amin(1)
            assert bool((distance <= bounds + 1e-12 * scale * 1e3).all())
        assert result.products <= max_iterations
    assert result.converged
    assert torch.allclose(result.largest, values.flip(0)[:k], rtol=1e-8, atol=0)
    assert torch.allclose(result.smallest, values[:k], rtol=1e-8, atol=0)


def test_multiple_eigenvalues_are_found_after_the_krylov_space_is_exhausted():
    values = torch.tensor([2.0, 2.0, -1.0, -1.0, 0.5, 0.5], **FLOAT64)
    result = lanczos(MatrixOperator(torch.diag(values)), k=2, max_iterations=6, rtol=1e-10)
    assert result.largest[0].item() == pytest.approx(2.0)
    assert result.smallest[0].item() == pytest.approx(-1.0)


def test_multiple_of_the_identity_takes_one_product():
    result = lanczos(MatrixOperator(3.0 * torch.eye(5, **FLOAT64)))
    assert (result.largest.item(), result.smallest.item()) == pytest.approx((3.0, 3.0))
    assert (result.products, result.converged) == (1, True)


def test_zero_operator():
    result = lanczos(MatrixOperator(torch.zeros(4, 4, device=DEVICE)))
    assert (result.largest.item(), result.smallest.item(), result.converged) == (0.0, 0.0, True)


def test_nan_is_neither_converged_nor_an_endless_loop():
    operator = MatrixOperator(torch.eye(4, device=DEVICE))
    operator.matrix = torch.full((4, 4), torch.nan, device=DEVICE)
    result = lanczos(operator)
    assert not result.converged
    assert bool(result.largest.isnan().all())


def test_a_good_start_saves_products_and_a_generator_changes_the_start():
    matrix = spd_matrix(80, 1e3)
    _, vectors = torch.linalg.eigh(matrix)
    cold = lanczos(MatrixOperator(matrix), rtol=1e-3)
    start = vectors[:, -1] + vectors[:, 0] + 1e-3 * randn(80, seed=3)
    warm = lanczos(MatrixOperator(matrix), rtol=1e-3, start=start)
    assert warm.products < cold.products
    other = lanczos(MatrixOperator(matrix), max_iterations=3, generator=torch.Generator().manual_seed(5))
    same = lanczos(MatrixOperator(matrix), max_iterations=3, generator=torch.Generator().manual_seed(5))
    assert other.largest == same.largest
    assert other.largest != lanczos(MatrixOperator(matrix), max_iterations=3).largest


def test_a_start_in_an_invariant_subspace_does_not_hide_the_rest():
    matrix = torch.diag(torch.tensor([5.0, 1.0, -3.0], **FLOAT64))
    result = lanczos(MatrixOperator(matrix), start=torch.tensor([0.0, 1.0, 0.0], **FLOAT64))
    assert (result.largest.item(), result.smallest.item()) == pytest.approx((5.0, -3.0))


@pytest.mark.parametrize("bulk", [0.0, 0.1])
def test_a_start_of_old_eigenvectors_does_not_hide_a_new_one(bulk):
    values = torch.cat(
        [
            torch.tensor([1.0, -1.0, 10.0]),
            bulk * torch.rand(997, generator=torch.Generator().manual_seed(0)),
        ]
    ).to(**FLOAT64)
    start = torch.zeros(1000, **FLOAT64)
    start[:2] = 1.0
    result = lanczos(MatrixOperator(torch.diag(values)), start=start)
    assert result.converged
    assert (result.largest.item(), result.smallest.item()) == pytest.approx((10.0, -1.0))


def test_a_repeated_eigenvalue_is_found_once():
    values = torch.tensor([3.0, 3.0, 3.0, 2.0, 1.0, 0.5, 0.2, 0.1], device=DEVICE).to(**FLOAT64)
    assert lanczos(MatrixOperator(torch.diag(values)), k=3).largest.tolist() == pytest.approx([3.0, 2.0, 1.0])


@pytest.mark.parametrize("scale", [1e-30, 1e-22, 1e20, 1e30])
def test_squares_of_float32_neither_vanish_nor_overflow(scale):
    matrix = spd_matrix(40, 100.0, signs=True, dtype=torch.float64)
    values = torch.linalg.eigvalsh(matrix)
    operator = MatrixOperator((scale * matrix).float())
    ends = [lanczos(operator, rtol=1e-4).largest.item(), power_iteration(operator, which="largest", rtol=1e-2).value]
    assert ends == pytest.approx([scale * float(values[-1])] * 2, rel=1e-3)


def test_global_random_state_is_not_touched():
    before = torch.get_rng_state()
    lanczos(MatrixOperator(torch.eye(4, device=DEVICE)))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "got 0"),
        ({"k": 5}, "<= 4"),
        ({"k": 3, "max_iterations": 2}, "max_iterations"),
        ({"min_iterations": 200}, "min_iterations = 200"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        lanczos(MatrixOperator(torch.eye(4, device=DEVICE)), **options)


@pytest.mark.slow
@pytest.mark.parametrize("which", [0, 1], ids=["at the start", "trained"])
def test_the_spectrum_of_a_network_in_sixty_products(perceptrons, which):
    """Ritz values converge with the square of their residual; slowest at the lower end, where many are close."""
    operator, _, values = perceptrons[which]
    values = values.cpu()  # where Ritz values are
    scale = float(values.abs().amax())
    result = lanczos(operator, k=5, max_iterations=60, rtol=1e-6)
    assert torch.allclose(result.largest, values.flip(0)[:5], rtol=0, atol=1e-6 * scale)
    assert result.smallest[0].item() == pytest.approx(values[0].item(), abs=1e-6 * scale)
    assert result.products <= 60
    for found, bounds in ((result.largest, result.largest_bounds), (result.smallest, result.smallest_bounds)):
        assert bool(((found[:, None] - values[None]).abs().amin(1) <= bounds + 1e-12 * scale).all())


@pytest.mark.slow
def test_eigenvectors_belong_to_their_values(perceptrons):
    operator, _, _ = perceptrons[1]
    result = lanczos(operator, k=3, max_iterations=60, vectors=True)
    for values, vectors, bounds in (
        (result.largest, result.largest_vectors, result.largest_bounds),
        (result.smallest, result.smallest_vectors, result.smallest_bounds),
    ):
        assert vectors.shape == (3, operator.size)
        assert torch.allclose(vectors @ vectors.T, torch.eye(3, **FLOAT64), atol=1e-10)
        for value, vector, bound in zip(values, vectors, bounds, strict=True):
            residual = (operator.matvec(vector) - value * vector).norm()
            assert residual.item() == pytest.approx(bound.item(), rel=1e-3, abs=1e-10)
    assert lanczos(operator, max_iterations=3).largest_vectors is None


def test_lanczos_takes_as_many_products_as_asked():
    operator = MatrixOperator(spd_matrix(50, 1e3))
    assert lanczos(operator, rtol=0.5).products < 7
    assert lanczos(operator, rtol=0.5, min_iterations=7).products == 7


@pytest.mark.parametrize("options", [{"k": 3}, {"min_iterations": 3}], ids=str)
def test_as_few_products_are_allowed_as_are_asked_for(options):
    operator = MatrixOperator(torch.diag(torch.arange(1.0, 9.0, device=DEVICE)))
    assert lanczos(operator, max_iterations=3, **options).products == 3
