"""Learned data augmentation: x' = U(x, ε), with the parameters of U tuned while a network trains on x'."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_ifthpo import BilevelLightningModule
from lightning_ifthpo.hyperparameters import AugmentationNetwork, RandomDistortion

LEARNING_RATE, MOMENTUM = 0.05, 0.9
# Fractions of a run: with the full learning rate, which then falls linearly to zero; and with hyper steps. Tuning until
# the end costs more, and gains nothing.
CONSTANT, TUNED = 0.5, 0.6

# The best of 0.6, 0.8, 1 and 1.2 times these widths, which validate at .965, .968, .971 and .966.
HAND_SET = {"rotation": 14.3, "scale": 0.125, "shear": 0.25, "translation": 0.04375, "elastic": 0.05}

# Displacement network: side of the coarse field; its bound, in halves of the image; channels of each kind of noise.
CELLS, LARGEST_DISPLACEMENT, NOISE_CHANNELS = 7, 0.4, 4


class DisplacementNetwork(nn.Module):
    """A network that draws a displacement field for each image: coarse, so that its interpolation is smooth.

    Its inputs are the image, coordinates and noise. One part of the noise is the same all over the image, so that whole
    images can turn and grow. In eval mode images stay as they are.

    Args:
        channels: Channels of the images.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        width, last = 32, nn.Conv2d(32, 2, 1, bias=False)
        self.net = nn.Sequential(
            *(nn.Conv2d(channels + 2 * NOISE_CHANNELS + 2, width, 3, padding=1), nn.SiLU()),
            *(nn.Conv2d(width, width, 3, padding=1), nn.SiLU(), last),
        )
        last.weight.data.mul_(0.3)  # so that it starts with small displacements
        self.requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """Returns displaced images [B, C, H, W] in training mode."""
        if not self.training:
            return images
        batch = len(images)
        identity = torch.eye(2, 3, device=images.device).expand(batch, 2, 3)
        places = F.affine_grid(identity, [batch, 1, CELLS, CELLS], align_corners=False).permute(0, 3, 1, 2)
        local = images.new_empty(batch, NOISE_CHANNELS, CELLS, CELLS).normal_()
        common = images.new_empty(batch, NOISE_CHANNELS, 1, 1).normal_().expand_as(local)
        seen = torch.cat([F.adaptive_avg_pool2d(images, CELLS), places, local, common], dim=1)
        field = LARGEST_DISPLACEMENT * self.net(seen).tanh()
        fine = F.interpolate(field, size=images.shape[2:], mode="bicubic", align_corners=False)
        grid = F.affine_grid(identity, list(images.shape), align_corners=False) + fine.permute(0, 2, 3, 1)
        return F.grid_sample(images, grid, align_corners=False)


# Makes each augmentation, for images with a given number of channels.
AUGMENTATIONS: dict[str, Callable[[int], nn.Module]] = {
    "identity": lambda channels: nn.Identity(),
    "hand-set": lambda channels: RandomDistortion(HAND_SET),
    "U-Net": lambda channels: AugmentationNetwork(channels, width=8),
    "displacements": DisplacementNetwork,
    "distortions": lambda channels: RandomDistortion(),
}


def network(channels: int, classes: int) -> nn.Module:
    """Returns two strided convolutions and a linear layer."""
    return nn.Sequential(
        *(nn.Conv2d(channels, 16, 5, stride=2, padding=2), nn.ReLU()),
        *(nn.Conv2d(16, 32, 5, stride=2, padding=2), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(7), nn.Flatten(), nn.Linear(32 * 7 * 7, classes)),
    )


class Classifier(BilevelLightningModule, L.LightningModule):
    """A network that learns from augmented images.

    Args:
        net: The network.
        augment: Changes the images of a training batch.
        steps: Number of training steps to come.
        hyper_rate: Learning rate of the parameters of the augmentation; None leaves them as they are.
        hyper_steps: Number of hyper steps to come, over which that rate goes to zero.
    """

    augment: nn.Module

    def __init__(
        self, net: nn.Module, augment: nn.Module, steps: int, hyper_rate: float | None = None, hyper_steps: int = 1
    ) -> None:
        super().__init__()
        self.net, self.steps = net, steps
        self.hyper_rate, self.hyper_steps = hyper_rate, hyper_steps
        if hyper_rate is None:
            self.augment = augment
        else:
            self.register_hyperparameter("augment", augment)

    def inner_loss(self, batch: Any) -> Tensor:
        """Returns the loss on augmented training images, which the network minimizes."""
        images, labels = batch
        return F.cross_entropy(self.mark_outputs(self.net(self.augment(images))), labels)

    def outer_loss(self, batch: Any) -> Tensor:
        """Returns the loss on outer images as they are, which the augmentation minimizes."""
        images, labels = batch
        return F.cross_entropy(self.net(images), labels)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Logs the accuracy on images as they are."""
        images, labels = batch
        self.log("accuracy", (self.net(images).argmax(1) == labels).float().mean())

    def configure_optimizers(self) -> Any:
        """Returns the optimizer of the network, with its schedule."""
        optimizer = torch.optim.SGD(self.net.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min(1.0, (1.0 - step / self.steps) / (1.0 - CONSTANT))
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_hyper_optimizer(self) -> torch.optim.Optimizer:
        """Returns the optimizer of the augmentation, with a schedule that moves on at each of its steps."""
        assert self.hyper_rate is not None, "a fixed augmentation is not tuned"
        optimizer = torch.optim.Adam(self.hyperparameters(), lr=self.hyper_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, self.hyper_steps))
        optimizer.register_step_post_hook(lambda *_: schedule.step())
        return optimizer
