"""Metrics of the training loss's curvature: a FloatingPointError if one is not finite."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import lightning as L

from lightning_ifthpo.core.loss import Loss
from lightning_ifthpo.curvature import CurvatureOperator
from lightning_ifthpo.curvature.kinds import LossCurvature, curvature_operator
from lightning_ifthpo.optimizers import StabilityEdge, has_edge
from lightning_ifthpo.runtime.losses import trainable
from lightning_ifthpo.runtime.observed_loss import ObservedLoss
from lightning_ifthpo.runtime.telling import rank_zero_warn
from lightning_ifthpo.runtime.verification import trusted_operator
from lightning_ifthpo.spectrum import (
    ExtremeEigenvalues,
    SpectralDensity,
    SpectrumTracker,
    spectral_density,
    trace,
)


class CurvatureGauge:
    """Measures the curvature of an observed loss, preconditioned as the optimizer does.

    Args:
        kind: The curvature.
        preconditioned: True requires optimizers with a known stability edge; None then measures without, if there is
            none; False always does.

    Attributes:
        kind: The curvature that is measured: the chosen one, or finite differences of a loss without second
            derivatives.
    """

    def __init__(self, kind: LossCurvature, preconditioned: bool | None) -> None:
        self.kind = kind
        self._preconditioned = preconditioned

    def check(self, trainer: L.Trainer, name: str) -> None:
        """Says which optimizers have no known stability edge; `name` is the prefix of the metrics.

        Raises:
            ValueError: If there is one, and one is required.
        """
        unknown = {type(optimizer).__name__ for optimizer in trainer.optimizers if not has_edge(optimizer)}
        names = ", ".join(sorted(unknown))
        if not names or self._preconditioned is False:
            return
        if self._preconditioned:
            raise ValueError(
                f"preconditioned=True needs a known stability edge, and {names} has none; use preconditioned=None"
            )
        rank_zero_warn(
            f"the stability edge of {names} is not known: {name}/lambda_max is measured without a preconditioner, "
            f"and {name}/edge_ratio is not logged"
        )

    def spectrum(
        self, observed: ObservedLoss, batch: object, tracker: SpectrumTracker
    ) -> tuple[dict[str, float], bool]:
        """Returns the metrics of both ends of the spectrum, and whether they have converged."""
        with self._operator(observed, batch) as (operator, edge):
            ends = tracker.measure(operator)
            return spectrum_metrics(ends, edge), ends.converged  # NaN raises: more iterations do not mend it

    def trace(self, observed: ObservedLoss, batch: object) -> dict[str, float]:
        """Returns the metrics of the trace."""
        with self._operator(observed, batch) as (operator, _):
            return trace_metrics(operator)

    def density(self, observed: ObservedLoss, batch: object) -> SpectralDensity:
        """Returns the spectral density."""
        with self._operator(observed, batch) as (operator, _):
            return spectral_density(operator)

    @contextmanager
    def _operator(
        self, observed: ObservedLoss, batch: object
    ) -> Iterator[tuple[CurvatureOperator, StabilityEdge | None]]:
        """Gives the operator to measure, and the edge of its λ_max if that is known."""
        edge = StabilityEdge.of(observed.trainer.optimizers, trainable(observed.module))
        metric = None if edge is None else edge.metric
        if metric is not None and self._preconditioned is False:
            edge = metric = None  # it is the edge of the preconditioned curvature
        with observed.session(self.kind):
            operator = observed.curvature_on(batch, lambda loss: self._of(loss, observed))
            yield (operator if metric is None else operator.preconditioned(metric)), edge

    def _of(self, loss: Loss, observed: ObservedLoss) -> CurvatureOperator:
        if observed.losses.is_verified:
            return curvature_operator(self.kind, loss, loss.parameters)
        operator, self.kind = trusted_operator(observed.losses, loss, self.kind, "SharpnessMonitor")
        return operator


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
