"""Gradients of an outer loss with respect to hyperparameters: implicit, unrolled and by a linear best response."""

from lightning_ifthpo.hypergradients.best_response import LinearBestResponse
from lightning_ifthpo.hypergradients.check import HypergradientMismatchError, check_hypergradient
from lightning_ifthpo.hypergradients.implicit import implicit_hypergradient
from lightning_ifthpo.hypergradients.influence import Influence, influence
from lightning_ifthpo.hypergradients.result import Hypergradient
from lightning_ifthpo.hypergradients.unrolled import unrolled_hypergradient

__all__ = [
    "Hypergradient",
    "HypergradientMismatchError",
    "Influence",
    "LinearBestResponse",
    "check_hypergradient",
    "implicit_hypergradient",
    "influence",
    "unrolled_hypergradient",
]
