"""Ready-made hyperparameters: modules to register on a `BilevelLightningModule`."""

from lightning_ifthpo.hyperparameters.augmentation import AugmentationNetwork, InputNoise
from lightning_ifthpo.hyperparameters.decay import WeightDecay
from lightning_ifthpo.hyperparameters.distilled import DistilledData
from lightning_ifthpo.hyperparameters.distortion import RandomDistortion
from lightning_ifthpo.hyperparameters.dropout import Dropout
from lightning_ifthpo.hyperparameters.losses import LabelSmoothing, LossWeights
from lightning_ifthpo.hyperparameters.mixup import Mixup
from lightning_ifthpo.hyperparameters.positive import Positive
from lightning_ifthpo.hyperparameters.weighting import IndexedDataset, SampleWeights

__all__ = [
    "AugmentationNetwork",
    "DistilledData",
    "Dropout",
    "IndexedDataset",
    "InputNoise",
    "LabelSmoothing",
    "LossWeights",
    "Mixup",
    "Positive",
    "RandomDistortion",
    "SampleWeights",
    "WeightDecay",
]
