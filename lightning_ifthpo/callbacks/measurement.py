"""Sharpness metrics of a curvature operator; a FloatingPointError if one is not finite."""

from __future__ import annotations

import math

from lightning_ifthpo.curvature import CurvatureOperator
from lightning_ifthpo.optimizers import StabilityEdge
from lightning_ifthpo.spectrum import ExtremeEigenvalues, trace


def spectrum_metrics(ends: ExtremeEigenvalues, edge: StabilityEdge | None) -> dict[str, float]:
    """Returns both ends of a spectrum, and their relation to the stability edge if it is known."""
    largest = ends.largest.tolist()
    metrics = {
        "lambda_max": largest[0],
        **{f"lambda_{rank}": value for rank, value in enumerate(largest[1:], start=2)},
        "lambda_min": float(ends.smallest[0]),
        "residual": ends.relative_residual,
        "products": float(ends.products),
    }
    if edge is not None:
        assert ends.largest_vectors is not None, "measure the ends with vectors"
        metrics["edge_ratio"] = edge.ratio(largest[0], ends.largest_vectors[0])
        if math.isfinite(edge.sharpness):  # it is infinite at a learning rate of zero
            metrics["edge"] = edge.sharpness
    return _finite(metrics)


def trace_metrics(operator: CurvatureOperator) -> dict[str, float]:
    """Returns the trace and its standard error, by at most 60 products."""
    estimate = trace(operator)
    return _finite({"trace": estimate.trace, "trace_error": estimate.standard_error})


def _finite(metrics: dict[str, float]) -> dict[str, float]:
    if not all(map(math.isfinite, metrics.values())):
        raise FloatingPointError("NaN or infinity in the curvature; check the batch, the loss and the weights")
    return metrics
