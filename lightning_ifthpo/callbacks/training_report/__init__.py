"""The callback `TrainingReport`, and its parts: what it collects, how it judges, and how it shows it."""

from lightning_ifthpo.callbacks.training_report.callback import TrainingReport

__all__ = ["TrainingReport"]
