"""Learned augmentations of the training inputs; in eval mode they return their input."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_ifthpo.core.validation import is_ascending, require_at_least, require_broadcastable, require_shape
from lightning_ifthpo.hyperparameters.bounded import Bounded


class InputNoise(Bounded):
    """Adds Gaussian noise of learned scale: x + s ε with ε ~ N(0, I) and s = maximum · σ(λ).

    Like dropout, it draws noise in training mode only: the inner loss has noise, the outer loss has none.

    Args:
        shape: Shape of s: () for one scale, (C, 1, 1) for one per channel of images.
        initial: Each scale at the start, in (0, maximum), in the unit of x.
        maximum: Upper bound of each scale, in the unit of x.

    Raises:
        ValueError: If an argument is out of range; when called, if s does not broadcast to the shape of x.
        TypeError: When called, if x is not floating-point.

    >>> noise = InputNoise((3, 1, 1), initial=0.1)
    >>> noise(torch.zeros(2, 3, 28, 28)).shape
    torch.Size([2, 3, 28, 28])
    """

    def __init__(self, shape: tuple[int, ...] = (), *, initial: float = 0.1, maximum: float = 1.0) -> None:
        super().__init__(initial, maximum)
        require_shape("shape", shape)
        self.logits = nn.Parameter(torch.full(shape, self._logit(initial)), requires_grad=False)

    def natural_values(self) -> Tensor:
        """Returns the scale s of the noise, in the unit of x, of the shape that was given."""
        return self._value(self.logits)

    def forward(self, x: Tensor) -> Tensor:
        """Returns x, of any shape to which s broadcasts, plus noise in training mode; x itself in eval mode."""
        if not x.is_floating_point():
            raise TypeError(f"expected a floating-point input, got {x.dtype}; convert it before noise is added")
        require_broadcastable("scales", self.logits.shape, x.shape)
        return x + self.natural_values().to(x.dtype) * torch.randn_like(x) if self.training else x


class AugmentationNetwork(nn.Module):
    """A small U-Net that changes training images, as in Lorraine, Vicol, Duvenaud (2019): x + maximum · tanh U(x, ε).

    The noise ε ~ N(0, I) enters as extra channels, so that one image has many versions. The network starts as the
    identity, because its last convolution is zero. GroupNorm keeps the activations from growing with the weights;
    unlike BatchNorm it does not mix images. In eval mode, and so in the outer loss, images are not changed.

    Args:
        channels: Channels of the images.
        width: Channels at full resolution; they double with each halving of the resolution.
        depth: How often the resolution is halved, by convolutions of stride two.
        noise_channels: Channels of ε; 0 for a deterministic change.
        maximum: Bound of the change of each pixel, in the unit of x; 1 suits images of unit variance.

    Raises:
        ValueError: If an argument is out of range; when called, if x is not [B, channels, H, W].

    >>> augment = AugmentationNetwork(1, width=8)
    >>> images = torch.rand(2, 1, 28, 28)
    >>> torch.equal(augment(images), images)
    True
    """

    def __init__(
        self, channels: int = 1, *, width: int = 16, depth: int = 2, noise_channels: int = 1, maximum: float = 1.0
    ) -> None:
        super().__init__()
        require_at_least("channels", channels, 1)
        require_at_least("width", width, 2)  # GroupNorm needs two values per image, and an image may have one pixel
        require_at_least("depth", depth, 1)
        require_at_least("noise_channels", noise_channels, 0)
        if not is_ascending(0.0, maximum, math.inf):
            raise ValueError(f"expected 0 < maximum < inf, got {maximum!r}")
        self.channels = channels
        self.noise_channels = noise_channels
        self.maximum = maximum
        levels = [(width * 2**level, width * 2 ** (level + 1)) for level in range(depth)]
        self.first = _block(channels + noise_channels, width)
        self.down = nn.ModuleList(_block(fine, coarse, stride=2) for fine, coarse in levels)
        self.up = nn.ModuleList(_block(coarse + fine, fine) for fine, coarse in reversed(levels))
        self.last = nn.Conv2d(width, channels, kernel_size=1)
        for parameter in self.last.parameters():
            nn.init.zeros_(parameter)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """Returns changed images in training mode, x itself in eval mode; x: [B, channels, H, W], any H and W."""
        if x.ndim != 4 or x.shape[1] != self.channels:
            raise ValueError(f"expected images of shape [B, {self.channels}, H, W], got {tuple(x.shape)}")
        if not self.training:
            return x
        noise = torch.randn(len(x), self.noise_channels, *x.shape[2:], device=x.device, dtype=x.dtype)
        h, skips = self.first(torch.cat([x, noise], dim=1)), []
        for down in self.down:
            skips.append(h)
            h = down(h)
        for up in self.up:
            skip = skips.pop()
            h = up(torch.cat([F.interpolate(h, size=skip.shape[2:]), skip], dim=1))
        return x + self.maximum * torch.tanh(self.last(h))


def _block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """Returns a convolution, a norm within each image, and an activation with a second derivative."""
    convolution = nn.Conv2d(inputs, outputs, kernel_size=3, stride=stride, padding=1)
    return nn.Sequential(convolution, nn.GroupNorm(1, outputs), nn.SiLU())
