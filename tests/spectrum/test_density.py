"""Spectral densities of known matrices."""

from statistics import mean

import pytest
import torch
from scipy.stats import wasserstein_distance as _wasserstein_distance

from lightning_ifthpo.curvature import MatrixOperator
from lightning_ifthpo.spectrum import spectral_density
from tests.helpers.problems import SPECTRA, operator_of


def wasserstein_distance(values, others, weights):
    return _wasserstein_distance(values.numpy(), others.numpy(), weights.numpy())


@pytest.mark.parametrize("name", SPECTRA)
def test_the_density_of_a_known_matrix(name):
    """Wasserstein distance at most 1 % of the range on average, which is what the reported error stands for."""
    values = SPECTRA[name].double().sort().values
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
    density = spectral_density(MatrixOperator(3.0 * torch.eye(10, dtype=torch.float64)))
    assert density.eigenvalues.unique().tolist() == pytest.approx([3.0])
    assert (density.products, density.converged, density.error) == (1, True, 0.0)


def test_smoothed_density_integrates_to_one():
    density = spectral_density(operator_of(SPECTRA["flat"]))
    points = torch.linspace(-3, 5, 2001)
    assert float(torch.trapezoid(density.smoothed(points, width=0.1), points)) == pytest.approx(1.0, abs=1e-3)
