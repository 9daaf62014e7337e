"""Small networks and their losses, as functions of flat parameters too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.helpers.device import DEVICE, WHERE, randn


def batch() -> tuple[Tensor, Tensor]:
    return randn(8, 4, seed=3), torch.arange(8, device=DEVICE) % 3


def functional(net: nn.Module, loss: Callable[..., Tensor]) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """The loss as a function of the flat parameters, with buffers kept out of it."""
    names, shapes = zip(*[(n, p.shape) for n, p in net.named_parameters()], strict=True)

    def function(flat: Tensor) -> Tensor:
        parts = torch.split(flat, [s.numel() for s in shapes])
        parameters = {n: part.view(s) for n, part, s in zip(names, parts, shapes, strict=True)}
        buffers = {n: b.clone() for n, b in net.named_buffers()}
        return loss(lambda x: torch.func.functional_call(net, parameters | buffers, (x,)), flat)

    return function, torch.cat([p.detach().reshape(-1) for p in net.parameters()])


def two_layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).to(**WHERE)


class Net(nn.Module):
    """A small network with dropout and BatchNorm, both of which make naive products disagree."""

    def __init__(self, *, dropout: float = 0.5, **where: Any) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(dropout), nn.Linear(6, 3)
        ).to(**(WHERE | where))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)
