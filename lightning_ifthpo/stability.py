"""The curvature at which an optimizer becomes unstable; see `lightning_ifthpo.optimizers`."""

from lightning_ifthpo.optimizers import StabilityEdge, has_edge

__all__ = ["StabilityEdge", "has_edge"]
