"""Spectral densities of known matrices."""

from statistics import mean

import pytest
import torch
from scipy.stats import wasserstein_distance as _wasserstein_distance

from lightning_ifthpo.curvature import MatrixOperator
from lightning_ifthpo.spectrum import spectral_density
from lightning_ifthpo.spectrum.density import wasserstein
from tests.helpers.device import DEVICE, WHERE
from tests.helpers.problems import SPECTRA, operator_of


def wasserstein_distance(values, others, weights):
    return _wasserstein_distance(*(numbers.cpu().numpy() for numbers in (values, others, weights)))


@pytest.mark.slow
@pytest.mark.parametrize("name", SPECTRA)
def test_the_density_of_a_known_matrix(name):
    """Wasserstein distance at most 1 % of the range on average, which is what the reported error stands for."""
    values = SPECTRA[name].to(**WHERE).sort().values
    operator = operator_of(values)
    spread = float(values[-1] - values[0])
    distances, reported = [], []
    for seed in range(8):
        density = spectral_density(operator, generator=torch.Generator().manual_seed(seed))
        distances.append(wasserstein_distance(density.eigenvalues, values, density.weights) / spread)
        reported.append(density.error / spread)
        assert float(density.weights.sum()) == pytest.approx(1.0)
    assert mean(distances) <= 0.01
    assert mean(distances) <= mean(reported)


def test_density_stops_when_it_knows_enough():
    operator = operator_of(SPECTRA["flat"])
    coarse, fine = (spectral_density(operator, rtol=rtol, iterations=100) for rtol in (5e-2, 1.3e-2))
    assert coarse.converged
    assert fine.converged
    assert coarse.products < fine.products
    assert coarse.error > fine.error
    few = spectral_density(operator, rtol=1e-4, max_probes=2, iterations=10)
    assert (few.products, few.converged) == (20, False)


def test_density_of_a_multiple_of_the_identity_is_one_point():
    density = spectral_density(MatrixOperator(3.0 * torch.eye(10, **WHERE)))
    assert density.eigenvalues.unique().tolist() == pytest.approx([3.0])
    assert (density.products, density.converged, density.error) == (1, True, 0.0)


def test_smoothed_density_integrates_to_one():
    density = spectral_density(operator_of(SPECTRA["flat"]))
    points = torch.linspace(-3, 5, 2001, dtype=torch.float64)
    assert float(torch.trapezoid(density.smoothed(points, width=0.1), points)) == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"max_probes": 0}, "max_probes >= 1"), ({"iterations": 1}, "iterations >= 2")],
)
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        spectral_density(MatrixOperator(torch.eye(4, device=DEVICE)), **options)


def test_the_distance_of_two_distributions_is_that_of_scipy():
    values, others = torch.tensor([0.0, 1.0, 3.0], device=DEVICE), torch.tensor([-1.0, 2.0], device=DEVICE)
    weights, other_weights = torch.tensor([0.5, 0.25, 0.25], device=DEVICE), torch.tensor([0.1, 0.9], device=DEVICE)
    wanted = _wasserstein_distance(*(part.cpu().numpy() for part in (values, others, weights, other_weights)))
    assert wasserstein(values, weights, others, other_weights) == pytest.approx(wanted, rel=1e-6)


def test_the_probes_come_from_the_generator_and_are_always_the_same_without_one():
    operator = operator_of(torch.linspace(-1.0, 1.0, 40))
    seeded = [
        spectral_density(operator, max_probes=1, generator=torch.Generator().manual_seed(seed)) for seed in (5, 5, 6)
    ]
    assert torch.equal(seeded[0].weights, seeded[1].weights)
    assert not torch.equal(seeded[0].weights, seeded[2].weights)
    plain = [spectral_density(operator, max_probes=1).weights for _ in range(2)]
    assert torch.equal(*plain)
    assert not torch.equal(plain[0], seeded[0].weights)


def blocks(block, size):
    return torch.kron(torch.eye(size // len(block)), torch.tensor(block)).to(**WHERE)


EIGENVECTORS_OF_SIGNS = {
    "two weights": blocks([[1.0, 2.0], [2.0, 1.0]], 2),
    "ten pairs": blocks([[1.0, 2.0], [2.0, 1.0]], 20),
    "a swap": blocks([[0.0, 1.0], [1.0, 0.0]], 4),
    "all equal": torch.ones(3, 3, **WHERE),
    "one pair among zeros": torch.block_diag(blocks([[1.0, -1.0], [-1.0, 1.0]], 2), torch.zeros(78, 78, **WHERE)),
    "many pairs": blocks([[1.0, 2.0], [2.0, 1.0]], 80),
}


@pytest.mark.parametrize("matrix", EIGENVECTORS_OF_SIGNS.values(), ids=EIGENVECTORS_OF_SIGNS.keys())
def test_an_eigenvector_with_equal_entries_hides_nothing(matrix):
    """A probe of random signs may be an eigenvector of these, or be orthogonal to one."""
    values = torch.linalg.eigvalsh(matrix)
    for seed in range(10):
        density = spectral_density(MatrixOperator(matrix), generator=torch.Generator().manual_seed(seed))
        distance = wasserstein_distance(density.eigenvalues, values, density.weights)
        # the reported error is an expected one: a sample may be three times as far
        assert distance <= max(3.0 * density.error, 1e-6)
        assert density.products <= max(20 * 50, 2 * len(matrix))
        if len(matrix) <= 50:
            assert density.converged
            assert density.products <= 2 * len(matrix)


def test_a_small_operator_that_is_not_finite_says_so():
    operator = MatrixOperator(torch.eye(4, **WHERE))
    operator.matrix = torch.full((4, 4), torch.nan, **WHERE)
    density = spectral_density(operator)
    assert not density.converged
    assert density.error != density.error
