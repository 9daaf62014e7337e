"""The inner optimizer as a linear rule, when it becomes unstable, and an optimizer of hyperparameters."""

from lightning_ifthpo.optimizers.known import is_known, moving
from lightning_ifthpo.optimizers.polyak import PolyakRMSprop
from lightning_ifthpo.optimizers.stability import StabilityEdge, has_edge
from lightning_ifthpo.optimizers.update_rule import UpdateRule

__all__ = ["PolyakRMSprop", "StabilityEdge", "UpdateRule", "has_edge", "is_known", "moving"]
