"""Eigenvalues, trace and spectral density of a curvature operator, from a few products."""

from lightning_ifthpo.spectrum.density import SpectralDensity, spectral_density
from lightning_ifthpo.spectrum.lanczos import ExtremeEigenvalues, lanczos
from lightning_ifthpo.spectrum.power_iteration import Eigenpair, power_iteration
from lightning_ifthpo.spectrum.trace import TraceEstimate, trace
from lightning_ifthpo.spectrum.tracking import SpectrumTracker

__all__ = [
    "Eigenpair",
    "ExtremeEigenvalues",
    "SpectralDensity",
    "SpectrumTracker",
    "TraceEstimate",
    "lanczos",
    "power_iteration",
    "spectral_density",
    "trace",
]
