"""Hyperparameters by implicit differentiation, inside one Lightning training run."""

from lightning_ifthpo.best_response import LinearBestResponse
from lightning_ifthpo.callbacks import ExactGeN, IFTHypergradient, SharpnessMonitor
from lightning_ifthpo.hypergradient import (
    Hypergradient,
    HypergradientMismatchError,
    check_hypergradient,
    implicit_hypergradient,
)
from lightning_ifthpo.module import BilevelLightningModule
from lightning_ifthpo.unrolling import unrolled_hypergradient

__all__ = [
    "BilevelLightningModule",
    "ExactGeN",
    "Hypergradient",
    "HypergradientMismatchError",
    "IFTHypergradient",
    "LinearBestResponse",
    "SharpnessMonitor",
    "check_hypergradient",
    "implicit_hypergradient",
    "unrolled_hypergradient",
]
