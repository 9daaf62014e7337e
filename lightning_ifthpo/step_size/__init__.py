"""Learning rates from slope and curvature along the update: the generalized Newton's method (GeN)."""

from lightning_ifthpo.step_size.linearity import check_linear_in_lr
from lightning_ifthpo.step_size.parabola import (
    DirectionalModel,
    directional_model,
    fitted_model,
    group_model,
    optimal_group_steps,
    three_point_model,
)
from lightning_ifthpo.step_size.rules import AveragedRule, PublishedRule
from lightning_ifthpo.step_size.scheduler import ExactGeNLR

__all__ = [
    "AveragedRule",
    "DirectionalModel",
    "ExactGeNLR",
    "PublishedRule",
    "check_linear_in_lr",
    "directional_model",
    "fitted_model",
    "group_model",
    "optimal_group_steps",
    "three_point_model",
]
