"""Architectures of torchvision, with random weights, tiny images and three classes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision import models
from torchvision.models import convnext, densenet, resnet, swin_transformer, vgg, vision_transformer
from torchvision.models.segmentation.fcn import FCNHead

from tests.helpers.zoo import EXAMPLES, Member, Supervised, cross_entropy


def _settled(net: nn.Module, size: int) -> nn.Module:
    """Gives BatchNorm the statistics of some batches, and random offsets.

    With young statistics, outputs in eval mode grow to 1e40. Without offsets, dead channels end at the kink of a ReLU.
    """
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.5
        nn.init.normal_(norm.bias, std=0.1)
    with torch.no_grad():
        for _ in range(8):
            net(torch.randn(EXAMPLES, 3, size, size))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return net


def _classifier(make: Callable[[], nn.Module], size: int = 36, **options: Any) -> Callable[[], Member]:
    """Images of 36 pixels leave two by two for the last BatchNorm."""
    return lambda: Supervised(_settled(make(), size), (3, size, size), cross_entropy, **options)


def _vgg() -> nn.Module:
    features = vgg.make_layers([8, "M", 16, "M"], batch_norm=True)
    return nn.Sequential(
        features, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 16), nn.Dropout(), nn.Linear(16, 3)
    )


def _convnext() -> nn.Module:
    blocks = [convnext.CNBlockConfig(8, 16, 1), convnext.CNBlockConfig(16, None, 1)]
    return convnext.ConvNeXt(blocks, stochastic_depth_prob=0.2, layer_scale=0.5, num_classes=3)


def _vit() -> nn.Module:
    net = vision_transformer.VisionTransformer(16, 8, 1, 2, 16, 32, dropout=0.1, num_classes=3)
    nn.init.normal_(net.heads[0].weight)  # torchvision starts at zero, where nothing reaches the other layers
    return net


def _swin() -> nn.Module:
    options = {"window_size": [4, 4], "stochastic_depth_prob": 0.2, "num_classes": 3}
    return swin_transformer.SwinTransformer([2, 2], 8, [2, 1], [1, 2], **options)


def _dense() -> nn.Module:
    return densenet.DenseNet(growth_rate=4, block_config=(2, 2), num_init_features=8, num_classes=3)


class _AuxiliaryLosses(Supervised):
    """Adds the losses of both auxiliary classifiers in training."""

    def __init__(self) -> None:
        net = models.GoogLeNet(num_classes=3, init_weights=False)
        super().__init__(_settled(net, 36), (3, 36, 36), cross_entropy)

    def losses(self, batch: Any) -> Tensor:
        x, y = batch
        outputs = self.net(x)
        if not self.training:
            return cross_entropy(outputs, y)
        parts = outputs.logits, outputs.aux_logits1, outputs.aux_logits2
        return sum(weight * cross_entropy(part, y) for weight, part in zip((1.0, 0.3, 0.3), parts, strict=True))


class _Segmentation(Member):
    """The head of a fully convolutional network on two convolutions, and the loss of each pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.head = FCNHead(16, 3)

    def batch(self) -> Any:
        return torch.randn(EXAMPLES, 3, 16, 16), torch.randint(0, 3, (EXAMPLES, 16, 16))

    def losses(self, batch: Any) -> Tensor:
        x, y = batch
        logits = F.interpolate(self.head(self.backbone(x)), size=(16, 16), mode="bilinear", align_corners=False)
        return F.cross_entropy(logits, y, reduction="none").mean((1, 2))


class _Detection(Member):
    """Boxes and classes of regions. roi_align has no second derivative."""

    may_be_refused = True

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Tanh())
        self.boxes, self.classes = nn.Linear(32, 4), nn.Linear(32, 3)

    def batch(self) -> Any:
        corner = torch.rand(EXAMPLES, 2) * 8
        boxes = torch.cat([corner, corner + 6], 1)
        return {"images": torch.randn(EXAMPLES, 3, 16, 16), "boxes": boxes, "labels": torch.arange(EXAMPLES) % 3}

    def losses(self, batch: Any) -> Tensor:
        h = self.backbone(batch["images"])
        regions = torch.cat([torch.arange(EXAMPLES)[:, None].to(h), batch["boxes"].to(h)], 1)
        pooled = torchvision.ops.roi_align(h, regions, output_size=2).flatten(1)
        box = F.smooth_l1_loss(self.boxes(pooled), batch["boxes"].to(h) / 16, reduction="none").mean(1)
        return box + cross_entropy(self.classes(pooled), batch["labels"])


VISION: dict[str, Callable[[], Member]] = {
    "resnet18": _classifier(partial(models.resnet18, num_classes=3)),
    "resnext": _classifier(
        partial(resnet.ResNet, resnet.Bottleneck, [1, 1, 1, 1], num_classes=3, groups=4, width_per_group=4)
    ),
    "mobilenet_v2": _classifier(partial(models.mobilenet_v2, num_classes=3, width_mult=0.25)),
    "mobilenet_v3_small": _classifier(
        partial(models.mobilenet_v3_small, num_classes=3, width_mult=0.25), may_be_refused=True
    ),
    "efficientnet_b0": _classifier(partial(models.efficientnet_b0, num_classes=3)),
    "shufflenet": _classifier(partial(models.shufflenet_v2_x0_5, num_classes=3)),
    "squeezenet": _classifier(partial(models.squeezenet1_1, num_classes=3)),
    "mnasnet": _classifier(partial(models.mnasnet0_5, num_classes=3)),
    "densenet": _classifier(_dense),
    "vgg": _classifier(_vgg, 16),
    "regnet_x_400mf": _classifier(partial(models.regnet_x_400mf, num_classes=3)),
    "convnext": _classifier(_convnext),
    "vision transformer": _classifier(_vit, 16),
    "swin": _classifier(_swin, 16),
    "googlenet": _AuxiliaryLosses,
    "segmentation": _Segmentation,
    "detection": _Detection,
}
