"""The inner optimizer as a linear rule, and the curvature at which it becomes unstable."""

from lightning_ifthpo.optimizers.known import is_known, moving
from lightning_ifthpo.optimizers.stability import StabilityEdge, has_edge
from lightning_ifthpo.optimizers.update_rule import UpdateRule

__all__ = ["StabilityEdge", "UpdateRule", "has_edge", "is_known", "moving"]
