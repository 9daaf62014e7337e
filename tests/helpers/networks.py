"""Small networks and their losses, as functions of flat parameters too."""

import torch
from torch import nn

from lightning_ifthpo.curvature import (
    FiniteDifferenceOperator,
    GaussNewtonOperator,
    HessianOperator,
)

OPERATORS = [HessianOperator, GaussNewtonOperator, FiniteDifferenceOperator]


# float64: double backward is exact to rounding; central differences leave cbrt(eps)² ≈ 4e-11 times third derivatives
TOLERANCE = {HessianOperator: 1e-12, GaussNewtonOperator: 1e-12, FiniteDifferenceOperator: 1e-7}


def batch():
    generator = torch.Generator().manual_seed(3)
    return torch.randn(8, 4, dtype=torch.float64, generator=generator), torch.arange(8) % 3


def functional(net, loss):
    """The loss as a function of the flat parameters, with buffers kept out of it."""
    names, shapes = zip(*[(n, p.shape) for n, p in net.named_parameters()], strict=True)

    def function(flat):
        parts = torch.split(flat, [s.numel() for s in shapes])
        parameters = {n: part.view(s) for n, part, s in zip(names, parts, shapes, strict=True)}
        buffers = {n: b.clone() for n, b in net.named_buffers()}
        return loss(lambda x: torch.func.functional_call(net, parameters | buffers, (x,)), flat)

    return function, torch.cat([p.detach().reshape(-1) for p in net.parameters()])


def two_layers():
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
