"""The trace and its error."""

from statistics import median

import pytest
import torch

from lightning_ifthpo.curvature import MatrixOperator
from lightning_ifthpo.spectrum import spectral_density, trace
from tests.helpers.device import DEVICE, FLOAT64, WHERE
from tests.helpers.problems import SPECTRA, operator_of


@pytest.mark.slow
@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("products", [30, 90])
def test_the_error_of_the_trace_is_what_it_is_said_to_be(name, products):
    """The median error of a normal distribution is 0.67 standard errors; with ten samples a little more."""
    values = SPECTRA[name].to(**WHERE)
    operator = operator_of(values)
    errors = []
    for seed in range(100):
        result = trace(operator, products=products, generator=torch.Generator().manual_seed(seed))
        errors.append(abs(result.trace - float(values.sum())) / result.standard_error)
        assert result.products == products
    assert 0.4 < median(errors) < 1.0


def test_dominant_eigenvalues_do_not_blur_the_trace():
    """What Hutch++ is for: outliers of 1e6 over a bulk of one."""
    values = torch.cat([torch.full((5,), 1e6, device=DEVICE), torch.ones(995, device=DEVICE)]).to(**WHERE)
    result = trace(operator_of(values), products=60, rtol=1e-3)
    assert result.trace == pytest.approx(float(values.sum()), rel=1e-6)
    assert result.converged
    assert not trace(operator_of(SPECTRA["flat"]), products=60, rtol=1e-6).converged


def test_density_and_trace_say_when_the_operator_is_not_finite():
    operator = MatrixOperator(torch.eye(100, device=DEVICE))
    operator.matrix = torch.full((100, 100), torch.nan, device=DEVICE)
    assert not spectral_density(operator).converged
    assert not trace(operator).converged
    assert not trace(operator, products=100).converged


def test_refuses_fewer_products_than_its_thirds_need():
    with pytest.raises(ValueError, match="products >= 6"):
        trace(MatrixOperator(torch.eye(4, device=DEVICE)), products=5)


def test_a_third_of_the_products_is_enough_for_an_operator_of_that_rank():
    """It is then seen whole, and nothing is left to sample."""
    values = torch.cat([torch.tensor([5.0, -3.0, 2.0, 1.0], **FLOAT64), torch.zeros(36, **FLOAT64)])
    estimate = trace(operator_of(values, dtype=torch.float64), products=12)
    assert estimate.trace == pytest.approx(5.0, abs=1e-12)
    assert estimate.standard_error < 1e-12
    assert estimate.products == 12
