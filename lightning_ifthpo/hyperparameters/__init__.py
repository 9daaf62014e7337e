"""Ready-made hyperparameters: modules to register on a `BilevelLightningModule`."""

from lightning_ifthpo.hyperparameters.decay import WeightDecay
from lightning_ifthpo.hyperparameters.weighting import IndexedDataset, SampleWeights

__all__ = ["IndexedDataset", "SampleWeights", "WeightDecay"]
