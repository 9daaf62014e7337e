"""What tests do to hyperparameter modules."""

import torch

from lightning_ifthpo.hyperparameters import AugmentationNetwork

EXTREMES = (-1e4, -30.0, 0.0, 30.0, 1e4)


def float64(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def fill(module, value):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(value)


def disturb(module, scale=0.3):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return module


def small_augmentation(**options):
    return AugmentationNetwork(1, **({"width": 2, "depth": 1} | options))
