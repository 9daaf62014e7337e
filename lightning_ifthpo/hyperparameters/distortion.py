"""Random distortions of training images, of learned widths; in eval mode they return their input."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Literal, TypeAlias, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_ifthpo.core.validation import require_choice
from lightning_ifthpo.hyperparameters.bounded import between, require_inside

Padding: TypeAlias = Literal["zeros", "border", "reflection"]

# Optimizers such as Adam move all hyperparameters at the same pace. What all widths share moves 2.5 times as far: a
# hypergradient shows well whether distortions should be stronger, and hardly which of them.
_SHARED = 2.5
_NODES = 4  # on each side of the coarse field of elastic displacements
_GEOMETRIC = frozenset({"rotation", "scale", "shear", "translation", "elastic"})


class RandomDistortion(nn.Module):
    """Affine maps, elastic displacements, changes of color and noise, drawn for each image, of learned width.

    A width s is the standard deviation of a normal distribution. It multiplies a number ε ~ N(0, 1) that is drawn
    first, so that the images can be differentiated with respect to it. Each width is maximum · σ(λ + 2.5 λ₀), with a λ
    of its own and a λ₀ that all widths share. In eval mode, and so in the outer loss, images are not changed.

    The kinds, and the unit of the width of each:

    - rotation: degrees;
    - scale: logarithm of the factor, of width and height each;
    - shear: horizontal displacement, as a fraction of the height;
    - translation: fraction of the image's side;
    - elastic: fraction of the image's side, by which each node of a 4 × 4 grid is displaced; smooth between the nodes;
    - noise: the unit of x;
    - contrast: logarithm of the factor by which pixels differ from the image's mean;
    - brightness: the unit of x, added to all pixels.

    Args:
        kinds: Names of the distortions, by default the first six. Or the widths to start from, by name, such as
            `natural_values()`.
        maximum: Upper bounds of the widths, by name; those of `RandomDistortion.maximum_widths` where none is given.
        padding: What lies beyond the image's border: "zeros", its nearest pixel, or its reflection.

    Raises:
        ValueError: If a name is unknown, no kind is named, or not 0 < width < maximum; when called, if x is not
            [B, C, H, W].
        TypeError: When called, if x is not floating-point.

    >>> distort = RandomDistortion({"rotation": 10.0, "noise": 0.1})
    >>> distort.natural_values()
    {'rotation': tensor(10.), 'noise': tensor(0.1000)}
    >>> distort(torch.rand(2, 3, 32, 32)).shape
    torch.Size([2, 3, 32, 32])
    """

    unit = 1.0  # λ is a logarithm, or nearly so

    # Small, but not zero, where a symmetric distribution has no gradient. Images are hardly recognized at the maximum.
    initial_widths: ClassVar[Mapping[str, float]] = {
        "rotation": 3.0,
        "scale": 0.05,
        "shear": 0.05,
        "translation": 0.025,
        "elastic": 0.01,
        "noise": 0.01,
        "contrast": 0.05,
        "brightness": 0.01,
    }
    maximum_widths: ClassVar[Mapping[str, float]] = {
        "rotation": 45.0,
        "scale": 0.5,
        "shear": 0.8,
        "translation": 0.15,
        "elastic": 0.15,
        "noise": 0.5,
        "contrast": 1.0,
        "brightness": 0.5,
    }

    def __init__(
        self,
        kinds: Sequence[str] | Mapping[str, float] = ("rotation", "scale", "shear", "translation", "elastic", "noise"),
        *,
        maximum: Mapping[str, float] | None = None,
        padding: Padding = "zeros",
    ) -> None:
        super().__init__()
        unknown = [kind for kind in (*kinds, *(maximum or ())) if kind not in self.initial_widths]
        if unknown or not kinds or isinstance(kinds, str):
            names = ", ".join(self.initial_widths)
            raise ValueError(f"expected kinds of distortions among {names}, got {kinds!r} and maximum={maximum!r}")
        require_choice("padding", padding, get_args(Padding))
        self.padding = padding
        widths = kinds if isinstance(kinds, Mapping) else {kind: self.initial_widths[kind] for kind in kinds}
        self.maximum = {kind: (maximum or {}).get(kind, self.maximum_widths[kind]) for kind in widths}
        for kind, width in widths.items():
            require_inside(float(width), self.maximum[kind])
        starts = [math.log(width / (self.maximum[kind] - width)) for kind, width in widths.items()]
        self.logits = nn.Parameter(torch.tensor(starts), requires_grad=False)
        self.shared = nn.Parameter(torch.zeros(()), requires_grad=False)

    def extra_repr(self) -> str:
        """Returns the kinds of distortions with their upper bounds, for the module's repr."""
        return ", ".join(f"{kind} < {maximum:g}" for kind, maximum in self.maximum.items())

    def natural_values(self) -> dict[str, Tensor]:
        """Returns the width of each kind of distortion, a scalar in the unit that is named above."""
        logits = self.logits + _SHARED * self.shared
        return {kind: between(logit, 0.0, top) for logit, (kind, top) in zip(logits, self.maximum.items(), strict=True)}

    def forward(self, x: Tensor) -> Tensor:
        """Returns distorted images in training mode, x itself in eval mode; x: [B, C, H, W], any C, H and W."""
        if x.ndim != 4:
            raise ValueError(f"expected images of shape [B, C, H, W], got {tuple(x.shape)}")
        if not x.is_floating_point():
            raise TypeError(f"expected floating-point images, got {x.dtype}; divide bytes by 255")
        if not self.training:
            return x
        # in half precision a place in the image would be known to a few pixels only
        images = x.to(torch.promote_types(x.dtype, torch.float32))
        widths = self.natural_values()

        def draw(kind: str, *shape: int) -> Tensor:
            if kind not in widths:
                return images.new_zeros(1, *shape)
            return widths[kind].to(images.dtype) * images.new_empty(len(x), *shape).normal_()

        if not _GEOMETRIC.isdisjoint(widths):
            images = F.grid_sample(images, _places(draw, *x.shape[2:]), padding_mode=self.padding, align_corners=False)
        if "contrast" in widths:
            mean = images.mean((1, 2, 3), keepdim=True)
            images = mean + (images - mean) * draw("contrast", 1, 1, 1).exp()
        images = images + draw("brightness", 1, 1, 1) + draw("noise", *x.shape[1:])
        return images.to(x.dtype)


def _places(draw: Callable[..., Tensor], height: int, width: int) -> Tensor:
    """Returns where each pixel of the new images comes from, [B, H, W, 2], as `grid_sample` takes it.

    Places lie in [−1, 1] in both directions. Rotations turn right angles into right angles whatever the side lengths.
    """
    angle, slant = draw("rotation", 1, 1) * (math.pi / 180.0), draw("shear", 1, 1)
    wide, high = draw("scale", 1, 1).exp(), draw("scale", 1, 1).exp()
    x, y = (torch.arange(1 - n, n, 2, device=angle.device, dtype=angle.dtype) / n for n in (width, height))
    y = y.unsqueeze(1)
    # rotation · [[wide, slant], [0, high]], applied to (x, y · height / width)
    ratio = height / width
    right = wide * x + slant * ratio * y
    down = high * y
    turned = (angle.cos() * right - angle.sin() * ratio * down, angle.sin() / ratio * right + angle.cos() * down)
    shifts = (draw("translation", 1, 1), draw("translation", 1, 1))
    field = F.interpolate(draw("elastic", 2, _NODES, _NODES), (height, width), mode="bicubic", align_corners=False)
    sides = [place + 2.0 * (shift + part) for place, shift, part in zip(turned, shifts, field.unbind(1), strict=True)]
    return torch.stack(sides, dim=-1)
