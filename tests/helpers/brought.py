"""Functions and modules that people bring, and that break naive derivatives."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class InTorch(torch.autograd.Function):
    """tanh with a backward pass made of torch operations."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient * (1 - x.tanh().square())


class Once(InTorch):
    """The same, whose backward pass can be differentiated once."""

    backward = staticmethod(once_differentiable(InTorch.backward))


class InNumpy(InTorch):
    """The same, whose backward pass leaves torch, so that its second derivative is lost."""

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient * torch.from_numpy(1 - x.detach().cpu().tanh().square().numpy()).to(x)


class Reversed(torch.autograd.Function):
    """The identity, whose gradient is turned round."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return -0.5 * gradient


class OwnCheckpoint(torch.autograd.Function):
    """Activation checkpointing as several libraries write it: weights inside get `.grad` by a backward pass inside."""

    @staticmethod
    def forward(ctx: Any, function: Any, x: Tensor) -> Tensor:
        ctx.function = function
        ctx.save_for_backward(x)
        with torch.no_grad():
            return function(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor | None]:
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            output = ctx.function(x)
        torch.autograd.backward(output, gradient)
        return None, x.grad


class Queue(nn.Module):
    """A memory bank of past keys, as in momentum contrast."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.encoder = nn.Linear(width, 8)
        self.register_buffer("keys", F.normalize(torch.randn(32, 8), dim=1))
        self.register_buffer("position", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        z = F.normalize(self.encoder(x[:8]), dim=1)
        logits = z @ self.keys.T.clone() / 0.2
        index = int(self.position)
        self.keys[index : index + 8] = z.detach()
        self.position.fill_((index + 8) % 32)
        return F.cross_entropy(logits, torch.arange(8, device=x.device))


class Annealed(nn.Module):
    """A penalty that grows with every call: by a buffer, an attribute, or a list."""

    def __init__(self, width: int, by: str) -> None:
        super().__init__()
        self.layer, self.by = nn.Linear(width, 3), by
        self.register_buffer("buffer", torch.zeros(()))
        self.attribute, self.calls = 0, []
        self.object = type("Counter", (), {"__init__": lambda counter: setattr(counter, "n", 0)})()

    def forward(self, x: Tensor) -> Tensor:
        self.buffer += 1
        self.attribute += 1
        self.calls.append(self.attribute)
        self.object.n += 1
        n = {"buffer": self.buffer, "attribute": self.attribute, "list": len(self.calls), "object": self.object.n}
        return self.layer(x).tanh().square().mean() + n[self.by] / 10 * self.layer.weight.square().sum()


class OwnNoise(nn.Module):
    """Noise from a generator that belongs to the module, or from a stream of numbers."""

    def __init__(self, width: int, stream: bool = False) -> None:
        super().__init__()
        self.layer = nn.Linear(width, 3)
        self.generator = torch.Generator().manual_seed(3)
        self.stream = (0.3 * step for step in range(1000)) if stream else None

    def forward(self, x: Tensor) -> Tensor:
        noise = torch.randn(3, generator=self.generator).to(x) if self.stream is None else next(self.stream)
        return (self.layer(x).tanh() + noise).square().mean()


class Codebook(nn.Module):
    """Vector quantization whose codebook follows by moving averages."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.encoder = nn.Linear(width, 4)
        self.register_buffer("book", torch.randn(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        z = self.encoder(x).tanh()
        nearest = torch.cdist(z.detach(), self.book).argmin(1)
        loss = F.mse_loss(z, self.book[nearest])
        for index in nearest.unique():
            self.book[index] = 0.5 * self.book[index] + 0.5 * z.detach()[nearest == index].mean(0)
        return loss


class Teacher(nn.Module):
    """A student that follows a teacher, which follows the student by moving averages of weights."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.student, self.teacher = nn.Linear(width, 4), nn.Linear(width, 4).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            for slow, fast in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                slow.mul_(0.5).add_(0.5 * 3.0 * torch.ones_like(fast))
        return F.mse_loss(self.student(x).tanh(), self.teacher(x).tanh())


MOVING = {
    "memory bank": Queue,
    "buffer": lambda width: Annealed(width, "buffer"),
    "attribute": lambda width: Annealed(width, "attribute"),
    "list": lambda width: Annealed(width, "list"),
    "object": lambda width: Annealed(width, "object"),
    "generator of its own": OwnNoise,
    "stream": lambda width: OwnNoise(width, stream=True),
    "codebook": Codebook,
    "teacher": Teacher,
}
"""Modules whose loss moves their own state at every call."""
