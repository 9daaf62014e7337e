"""Sharpness metrics of an operator whose spectrum is known."""

import math

import pytest
import torch

from lightning_ifthpo.callbacks.curvature import spectrum_metrics, trace_metrics
from lightning_ifthpo.curvature import MatrixOperator
from lightning_ifthpo.spectrum import lanczos
from lightning_ifthpo.stability import StabilityEdge

OPERATOR = MatrixOperator(torch.diag(torch.tensor([4.0, 2.0, 1.0, -0.5], dtype=torch.float64)))


def ends(operator=OPERATOR, k=1):
    return lanczos(operator, k=k, vectors=True)


def test_both_ends_are_reported_with_residual_and_products():
    metrics = spectrum_metrics(ends(), None)
    assert metrics["lambda_max"] == pytest.approx(4.0)
    assert metrics["lambda_min"] == pytest.approx(-0.5)
    assert metrics["residual"] < 1e-6
    assert metrics["products"] == 4.0
    assert "edge_ratio" not in metrics


def test_further_eigenvalues_are_counted_from_two():
    metrics = spectrum_metrics(ends(k=3), None)
    assert [metrics[name] for name in ("lambda_max", "lambda_2", "lambda_3")] == pytest.approx([4.0, 2.0, 1.0])


def test_the_edge_is_that_of_the_optimizer():
    metrics = spectrum_metrics(ends(), StabilityEdge(sharpness=8.0))
    assert metrics["edge"] == 8.0
    assert metrics["edge_ratio"] == pytest.approx(0.5)


def test_an_infinite_edge_is_not_reported():
    metrics = spectrum_metrics(ends(), StabilityEdge(sharpness=math.inf))
    assert metrics["edge_ratio"] == 0.0
    assert "edge" not in metrics


def test_the_trace_is_exact_for_few_weights():
    assert trace_metrics(OPERATOR) == {"trace": pytest.approx(6.5), "trace_error": 0.0}


@pytest.mark.parametrize("measure", [lambda operator: spectrum_metrics(ends(operator), None), trace_metrics])
def test_what_is_not_finite_is_an_error(measure):
    operator = MatrixOperator(torch.eye(3))
    operator.matrix = torch.full((3, 3), torch.nan)
    with pytest.raises(FloatingPointError, match="NaN or infinity in the curvature"):
        measure(operator)
