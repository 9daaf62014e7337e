"""Hyperparameters by implicit differentiation, inside one Lightning training run."""

from lightning_ifthpo.callbacks import (
    ExactGeN,
    HyperparameterRecorder,
    HyperparameterSchedule,
    IFTHypergradient,
    SharpnessMonitor,
    TrainingReport,
)
from lightning_ifthpo.core.loss import Loss
from lightning_ifthpo.hypergradients import (
    Hypergradient,
    HypergradientMismatchError,
    Influence,
    LinearBestResponse,
    check_hypergradient,
    implicit_hypergradient,
    influence,
    unrolled_hypergradient,
)
from lightning_ifthpo.module import BilevelLightningModule
from lightning_ifthpo.step_size import RateSuggestion
from lightning_ifthpo.wrong_labels import LabelIssues, label_issues, label_margins

__all__ = [
    "BilevelLightningModule",
    "ExactGeN",
    "Hypergradient",
    "HypergradientMismatchError",
    "HyperparameterRecorder",
    "HyperparameterSchedule",
    "IFTHypergradient",
    "Influence",
    "LabelIssues",
    "LinearBestResponse",
    "Loss",
    "RateSuggestion",
    "SharpnessMonitor",
    "TrainingReport",
    "check_hypergradient",
    "implicit_hypergradient",
    "influence",
    "label_issues",
    "label_margins",
    "unrolled_hypergradient",
]

__version__ = "0.1.0"
