"""Learning rates from slope and curvature along the update: the generalized Newton's method (GeN)."""

from lightning_ifthpo.step_size.critical import CriticalStep, CriticalTracker, critical_step
from lightning_ifthpo.step_size.linearity import check_linear_in_lr
from lightning_ifthpo.step_size.parabola import Parabola, exact_parabola, fitted_parabola, three_point_parabola
from lightning_ifthpo.step_size.race import RateTrial
from lightning_ifthpo.step_size.rules import AveragedRule, PublishedRule
from lightning_ifthpo.step_size.scheduler import ExactGeNLR
from lightning_ifthpo.step_size.suggestion import RateSuggestion

__all__ = [
    "AveragedRule",
    "CriticalStep",
    "CriticalTracker",
    "ExactGeNLR",
    "Parabola",
    "PublishedRule",
    "RateSuggestion",
    "RateTrial",
    "check_linear_in_lr",
    "critical_step",
    "exact_parabola",
    "fitted_parabola",
    "three_point_parabola",
]
