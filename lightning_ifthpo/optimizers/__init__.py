"""What is known of the inner optimizer: how it answers a gradient, and where it becomes unstable."""

from lightning_ifthpo.optimizers.stability import StabilityEdge, has_edge
from lightning_ifthpo.optimizers.update_rule import UpdateRule, is_known

__all__ = ["StabilityEdge", "UpdateRule", "has_edge", "is_known"]
