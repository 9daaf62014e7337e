"""Power iteration, against known spectra and dense eigenvalues."""

import math

import pytest
import torch

from lightning_ifthpo.curvature import MatrixOperator
from lightning_ifthpo.spectrum import power_iteration
from tests.helpers.device import DEVICE, FLOAT64, randn
from tests.helpers.problems import operator_of, spd_matrix


@pytest.mark.parametrize(("which", "expected"), [("magnitude", -2.0), ("largest", 1.5), ("smallest", -2.0)])
@pytest.mark.parametrize("scale", [1e-10, 1.0, 1e10])
def test_power_iteration_finds_the_eigenvalue_that_is_asked_for(which, expected, scale):
    values = scale * torch.cat(
        [torch.tensor([1.5, -2.0], device=DEVICE), torch.linspace(-0.5, 0.5, 100, device=DEVICE)]
    ).to(**FLOAT64)
    operator = operator_of(values, dtype=torch.float64)
    result = power_iteration(operator, which=which, rtol=1e-7, max_iterations=200)
    assert result.converged
    assert result.value == pytest.approx(expected * scale, rel=1e-10)
    residual = float((operator.matvec(result.vector) - result.value * result.vector).norm())
    assert residual == pytest.approx(result.bound, rel=1e-3)
    assert result.bound <= 1e-7 * 2.0 * scale


@pytest.mark.parametrize("values", [[-5.0, -3.0, -1.0], [1.0, 3.0, 5.0], [-5.0, 0.0, 0.1]], ids=str)
def test_power_iteration_finds_both_ends_whatever_their_signs(values):
    operator = operator_of(torch.tensor(values, dtype=torch.float64, device=DEVICE), dtype=torch.float64)
    ends = [power_iteration(operator, which=which, max_iterations=1000).value for which in ("smallest", "largest")]
    assert ends == pytest.approx([values[0], values[-1]], abs=1e-9)


def test_power_iteration_by_magnitude_does_not_pretend_to_settle_a_tie():
    """The question of the forum: the largest eigenvalue of {1.001, −1.002, rest below 0.3}."""
    operator = operator_of(
        torch.cat([torch.tensor([1.001, -1.002], device=DEVICE), torch.linspace(-0.3, 0.3, 200, device=DEVICE)]),
        dtype=torch.float64,
    )
    assert not power_iteration(operator, rtol=1e-3).converged
    for which, value in (("largest", 1.001), ("smallest", -1.002)):
        result = power_iteration(operator, which=which, rtol=1e-6)
        assert result.converged
        assert result.value == pytest.approx(value, abs=1e-6)


def test_power_iteration_takes_as_many_products_as_asked():
    operator = MatrixOperator(spd_matrix(50, 1e3))
    assert power_iteration(operator, rtol=0.9).products < 7
    assert power_iteration(operator, rtol=0.9, min_iterations=7).products == 7


def test_power_iteration_starts_where_it_is_told():
    matrix = spd_matrix(80, 1e3)
    _, vectors = torch.linalg.eigh(matrix)
    operator = MatrixOperator(matrix)
    assert power_iteration(operator, start=vectors[:, -1], rtol=1e-3).products == 1
    assert power_iteration(operator, start=torch.zeros(80, device=DEVICE), max_iterations=2).products == 2
    firsts = [power_iteration(operator, max_iterations=1, start=randn(80, seed=seed)).value for seed in (1, 1, 2)]
    assert firsts[0] == firsts[1] != firsts[2]


@pytest.mark.slow
@pytest.mark.parametrize("which", [0, 1], ids=["at the start", "trained"])
def test_power_iteration_in_float32_keeps_its_vector_a_unit_vector(perceptrons, which):
    """A bulk of tiny eigenvalues: near convergence the residual is rounding, and not orthogonal to the vector."""
    _, matrix, values = perceptrons[which]
    single = MatrixOperator(matrix.float())
    for max_iterations in (30, 100, 1000):
        result = power_iteration(single, which="largest", max_iterations=max_iterations, rtol=1e-7)
        assert float(result.vector.norm()) == pytest.approx(1.0, abs=1e-5)
        assert result.value <= float(values[-1]) * (1 + 1e-5)
    assert result.value == pytest.approx(float(values[-1]), rel=1e-5)


def test_power_iteration_on_nothing_and_on_nan():
    assert power_iteration(MatrixOperator(torch.zeros(3, 3, device=DEVICE))).converged
    operator = MatrixOperator(torch.eye(3, device=DEVICE))
    operator.matrix = torch.full((3, 3), torch.nan, device=DEVICE)
    result = power_iteration(operator)
    assert (result.converged, result.products) == (False, 1)
    assert math.isnan(result.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"which": "top"}, "'magnitude', 'largest', 'smallest'"),
        ({"max_iterations": 0}, "max_iterations >= 1"),
        ({"min_iterations": 200}, "min_iterations = 200"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        power_iteration(MatrixOperator(torch.eye(4, device=DEVICE)), **options)


@pytest.mark.parametrize("which", ["magnitude", "largest", "smallest"])
def test_the_last_product_is_that_of_the_vector_that_is_returned(which):
    """So that its bound is a residual, and no sum of earlier ones."""
    seen = []

    class Recorded(MatrixOperator):
        def matvec(self, v):
            seen.append(v.clone())
            return super().matvec(v)

    matrix = spd_matrix(20, 50.0, signs=True, dtype=torch.float64)
    pair = power_iteration(Recorded(matrix), which=which, max_iterations=5000, rtol=1e-7)
    assert pair.converged
    assert torch.equal(seen[-1], pair.vector)
    assert len(seen) == pair.products
    assert pair.bound == pytest.approx(float((matrix @ pair.vector - pair.value * pair.vector).norm()), rel=1e-6)
    assert "vector" not in repr(pair)
