"""Ready-made hyperparameters: modules to register on a `BilevelLightningModule`."""

from lightning_ifthpo.hyperparameters.augmentation import AugmentationNetwork, InputNoise
from lightning_ifthpo.hyperparameters.decay import WeightDecay
from lightning_ifthpo.hyperparameters.distilled import DistilledData
from lightning_ifthpo.hyperparameters.labels import LabelTransition, SoftLabels
from lightning_ifthpo.hyperparameters.losses import LabelSmoothing, LossWeights
from lightning_ifthpo.hyperparameters.positive import Positive
from lightning_ifthpo.hyperparameters.weighting import IndexedDataset, SampleWeights, WeightNetwork

__all__ = [
    "AugmentationNetwork",
    "DistilledData",
    "IndexedDataset",
    "InputNoise",
    "LabelSmoothing",
    "LabelTransition",
    "LossWeights",
    "Positive",
    "SampleWeights",
    "SoftLabels",
    "WeightDecay",
    "WeightNetwork",
]
