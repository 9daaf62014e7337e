"""Ready-made hyperparameters: modules to register on a `BilevelLightningModule`."""

from lightning_ifthpo.hyperparameters.adapters import LoRAGates
from lightning_ifthpo.hyperparameters.augmentation import AugmentationNetwork, InputNoise
from lightning_ifthpo.hyperparameters.decay import Anchor, WeightDecay
from lightning_ifthpo.hyperparameters.distilled import DistilledData
from lightning_ifthpo.hyperparameters.distortion import RandomDistortion
from lightning_ifthpo.hyperparameters.dropout import Dropout
from lightning_ifthpo.hyperparameters.imbalance import ClassWeights, LogitAdjustment
from lightning_ifthpo.hyperparameters.labels import LabelTransition, SoftLabels
from lightning_ifthpo.hyperparameters.losses import LabelSmoothing, LossWeights
from lightning_ifthpo.hyperparameters.mixup import Mixup
from lightning_ifthpo.hyperparameters.positive import Positive
from lightning_ifthpo.hyperparameters.softmax import FocalGamma, Temperature
from lightning_ifthpo.hyperparameters.weighting import IndexedDataset, SampleWeights, WeightNetwork

__all__ = [
    "Anchor",
    "AugmentationNetwork",
    "ClassWeights",
    "DistilledData",
    "Dropout",
    "FocalGamma",
    "IndexedDataset",
    "InputNoise",
    "LabelSmoothing",
    "LabelTransition",
    "LoRAGates",
    "LogitAdjustment",
    "LossWeights",
    "Mixup",
    "Positive",
    "RandomDistortion",
    "SampleWeights",
    "SoftLabels",
    "Temperature",
    "WeightDecay",
    "WeightNetwork",
]
