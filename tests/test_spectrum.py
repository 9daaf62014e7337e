import pytest
import torch

from lightning_ifthpo.curvature import MatrixOperator
from lightning_ifthpo.spectrum import lanczos
from tests.problems import spd_matrix


def test_both_ends_of_nearly_equal_magnitude():
    """A power iteration returns anything between −0.92 and 0.85 here, "converged"."""
    values = torch.cat([torch.tensor([1.001, -1.002]), torch.linspace(-0.3, 0.3, 200)]).double()
    result = lanczos(MatrixOperator(torch.diag(values)), rtol=1e-8)
    assert result.converged
    assert result.largest.item() == pytest.approx(1.001, abs=1e-6)
    assert result.smallest.item() == pytest.approx(-1.002, abs=1e-6)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("scale", [1e-10, 1.0, 1e10])
def test_dense_reference_and_bounds(k, scale):
    matrix = scale * spd_matrix(60, 1e3, signs=True)
    values = torch.linalg.eigvalsh(matrix)
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
    values = torch.tensor([2.0, 2.0, -1.0, -1.0, 0.5, 0.5], dtype=torch.float64)
    result = lanczos(MatrixOperator(torch.diag(values)), k=2, max_iterations=6, rtol=1e-10)
    assert result.largest[0].item() == pytest.approx(2.0)
    assert result.smallest[0].item() == pytest.approx(-1.0)


def test_multiple_of_the_identity_takes_one_product():
    result = lanczos(MatrixOperator(3.0 * torch.eye(5, dtype=torch.float64)))
    assert (result.largest.item(), result.smallest.item()) == pytest.approx((3.0, 3.0))
    assert (result.products, result.converged) == (1, True)


def test_zero_operator():
    result = lanczos(MatrixOperator(torch.zeros(4, 4)))
    assert (result.largest.item(), result.smallest.item(), result.converged) == (0.0, 0.0, True)


def test_nan_is_neither_converged_nor_an_endless_loop():
    operator = MatrixOperator(torch.eye(4))
    operator.matrix = torch.full((4, 4), torch.nan)
    result = lanczos(operator)
    assert not result.converged
    assert bool(result.largest.isnan().all())


def test_a_good_start_saves_products_and_a_generator_changes_the_start():
    matrix = spd_matrix(80, 1e3)
    _, vectors = torch.linalg.eigh(matrix)
    cold = lanczos(MatrixOperator(matrix), rtol=1e-3)
    warm = lanczos(MatrixOperator(matrix), rtol=1e-3, start=vectors[:, -1] + vectors[:, 0])
    assert warm.products < cold.products
    other = lanczos(MatrixOperator(matrix), max_iterations=3, generator=torch.Generator().manual_seed(5))
    same = lanczos(MatrixOperator(matrix), max_iterations=3, generator=torch.Generator().manual_seed(5))
    assert other.largest == same.largest
    assert other.largest != lanczos(MatrixOperator(matrix), max_iterations=3).largest


def test_a_start_in_an_invariant_subspace_does_not_hide_the_rest():
    matrix = torch.diag(torch.tensor([5.0, 1.0, -3.0], dtype=torch.float64))
    result = lanczos(MatrixOperator(matrix), start=torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64))
    assert (result.largest.item(), result.smallest.item()) == pytest.approx((5.0, -3.0))


def test_global_random_state_is_not_touched():
    before = torch.get_rng_state()
    lanczos(MatrixOperator(torch.eye(4)))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("options", "message"), [({"k": 0}, "got 0"), ({"k": 5}, "<= 4"), ({"k": 3, "max_iterations": 2}, "max_iterations")]
)
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        lanczos(MatrixOperator(torch.eye(4)), **options)
