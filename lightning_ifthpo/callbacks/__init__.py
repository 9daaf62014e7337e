"""Callbacks for the Trainer."""

from lightning_ifthpo.callbacks.gen import ExactGeN
from lightning_ifthpo.callbacks.hypergradient import IFTHypergradient
from lightning_ifthpo.callbacks.schedule import HyperparameterRecorder, HyperparameterSchedule
from lightning_ifthpo.callbacks.sharpness import SharpnessMonitor
from lightning_ifthpo.callbacks.training_report import TrainingReport

__all__ = [
    "ExactGeN",
    "HyperparameterRecorder",
    "HyperparameterSchedule",
    "IFTHypergradient",
    "SharpnessMonitor",
    "TrainingReport",
]
