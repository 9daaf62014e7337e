"""Small networks put together at random: layers, state that moves, hooks, tying, checkpoints, batches of many classes.

`Description` says everything about one of them, and prints as code that makes it again:
`Description(layers=("batch_norm", "tanh"), traits=("queue",), seed=3)`. `FEATURES` are all layers and traits.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import hypothesis.strategies as st
import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from lightning_ifthpo import BilevelLightningModule
from lightning_ifthpo.curvature import mark_outputs
from tests.helpers.evidence import Resting, listen
from tests.helpers.features import Example, Point

WIDTH = 4  # of every layer, so that all of them can follow each other
CLASSES = 3

# Layers: [B, 4] → [B, 4]


class Viewed(nn.Module):
    """A module that sees examples in another shape."""

    def __init__(self, module: nn.Module, *shape: int) -> None:
        super().__init__()
        self.module, self.shape = module, shape

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x.reshape(len(x), *self.shape)).reshape(len(x), WIDTH)


class Rows(nn.Module):
    """Adds rows of an embedding: row 0 is padding, and rows 5 to 7 are never used."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(8, WIDTH, padding_idx=0)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table((x.detach() > 0).sum(1))


class Cell(nn.Module):
    """A recurrent cell: half of the features are its input, half its state."""

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.cell = kind(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        inputs, state = x[:, :2], x[:, 2:]
        after = self.cell(inputs, (state, state))[0] if isinstance(self.cell, nn.LSTMCell) else self.cell(inputs, state)
        return torch.cat([inputs, after], 1)


class Sequence(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(2, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(2, 1, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class Dropout(nn.Module):
    """CUDA drops other numbers in float64 than in float32; the plain one drops what would be dropped in training."""

    plain, dtype = False, torch.float32

    def forward(self, x: Tensor) -> Tensor:
        if not self.plain:
            return F.dropout(x, 0.3, self.training)
        return x * F.dropout(torch.ones_like(x, dtype=self.dtype), 0.3, self.training).to(x)


class HardSigmoid(nn.Module):
    """torch's has no second derivative; the plain one is the same, with a slope of 1/6 rounded to float32 as there."""

    plain = False

    def forward(self, x: Tensor) -> Tensor:
        if not self.plain:
            return F.hardsigmoid(x)
        clamped = F.relu6(x + 3)
        sixth = torch.tensor(1 / 6).item() * clamped
        return (clamped / 6).detach() + sixth - sixth.detach()


class WeightNorm(nn.Module):
    """torch's own differentiates its second derivative wrongly (H is not symmetric); the plain one is composed."""

    plain = False

    def __init__(self) -> None:
        super().__init__()
        self.linear = parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        if not self.plain:
            return self.linear(x)
        length, v = self.linear.parametrizations.weight.original0, self.linear.parametrizations.weight.original1
        return F.linear(x, length * v / v.norm(dim=1, keepdim=True), self.linear.bias)


class Symmetric(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return (weight + weight.T) / 2


def _symmetric() -> nn.Module:
    return parametrize.register_parametrization(nn.Linear(WIDTH, WIDTH), "weight", Symmetric())


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(WIDTH, WIDTH),
    "conv1d": lambda: Viewed(nn.Conv1d(1, 1, 3, padding=1), 1, WIDTH),
    "conv2d": lambda: Viewed(nn.Conv2d(1, 1, 3, padding=1), 1, 2, 2),
    "batch_norm": lambda: nn.BatchNorm1d(WIDTH),
    "layer_norm": lambda: nn.LayerNorm(WIDTH),
    "group_norm": lambda: Viewed(nn.GroupNorm(1, 2), 2, 2),
    "embedding": Rows,
    "gru_cell": lambda: Cell(nn.GRUCell),
    "lstm_cell": lambda: Cell(nn.LSTMCell),
    "lstm": lambda: Viewed(Sequence(), 2, 2),
    "attention": lambda: Viewed(Attention(), 2, 2),
    "tanh": nn.Tanh,
    "gelu": nn.GELU,
    "relu": nn.ReLU,
    "softplus": nn.Softplus,
    "hardsigmoid": HardSigmoid,
    "dropout": Dropout,
    "weight_norm": WeightNorm,
    "spectral_norm": lambda: parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH)),
    "symmetric": _symmetric,
}


# State that moves with each evaluation of the loss: [B, 4] → a term of the loss


class Counter(nn.Module):
    """A penalty that grows with the number of evaluations, counted in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, h: Tensor) -> Tensor:
        self.count += 1
        return self.count / 10 * h.square().mean()


class PythonCounter(nn.Module):
    count = 0

    def forward(self, h: Tensor) -> Tensor:
        self.count += 1
        return self.count / 10 * h.square().mean()


class NestedCounter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.memory = {"counts": [0]}

    def forward(self, h: Tensor) -> Tensor:
        self.memory["counts"][0] += 1
        return self.memory["counts"][0] / 10 * h.square().mean()


class ObjectCounter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.memory = SimpleNamespace(count=0)

    def forward(self, h: Tensor) -> Tensor:
        self.memory.count += 1
        return self.memory.count / 10 * h.square().mean()


class Queue(nn.Module):
    """A memory bank of earlier features, as in momentum contrast."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("keys", F.normalize(torch.randn(12, WIDTH), dim=1))
        self.register_buffer("next", torch.zeros((), dtype=torch.long))

    def forward(self, h: Tensor) -> Tensor:
        loss = (F.normalize(h, dim=1) @ self.keys.clone().to(h).T).logsumexp(1).mean()
        rows = (int(self.next) + torch.arange(len(h), device=h.device)) % 12
        self.keys[rows] = F.normalize(h.detach().to(self.keys), dim=1)
        self.next.fill_((int(self.next) + len(h)) % 12)
        return loss


class PythonQueue(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.keys: deque[Tensor] = deque([torch.ones(WIDTH)], maxlen=3)

    def forward(self, h: Tensor) -> Tensor:
        loss = sum((h @ key.to(h)).square().mean() for key in self.keys) / 10
        self.keys.append(h.detach().mean(0))
        return loss


class Codebook(nn.Module):
    """The distance to the nearest code; codes follow the features."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("codes", torch.randn(3, WIDTH))

    def forward(self, h: Tensor) -> Tensor:
        nearest = torch.cdist(h.detach().to(self.codes), self.codes).argmin(1)
        loss = (h - self.codes[nearest]).square().mean()
        means = torch.stack([h.detach().to(self.codes)[nearest == code].sum(0) for code in range(3)])
        self.codes = 0.9 * self.codes + 0.1 * means
        return loss


class OwnGenerator(nn.Module):
    """Noise from a generator of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(1)

    def forward(self, h: Tensor) -> Tensor:
        return (h + torch.randn(h.shape, generator=self.generator, dtype=torch.float32).to(h)).square().mean()


class NumpyGenerator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.generator = np.random.default_rng(1)

    def forward(self, h: Tensor) -> Tensor:
        return (h + torch.from_numpy(self.generator.normal(size=h.shape)).to(h)).square().mean()


MOVING: dict[str, Callable[[], nn.Module]] = {
    "counter": Counter,
    "python_counter": PythonCounter,
    "nested_counter": NestedCounter,
    "object_counter": ObjectCounter,
    "queue": Queue,
    "python_queue": PythonQueue,
    "codebook": Codebook,
    "own_generator": OwnGenerator,
    "numpy_generator": NumpyGenerator,
}

# Traits of the whole network

HOOKS = ("counting_hook", "counting_backward_hook", "clipping_hook", "scaling_backward_hook", "tensor_hook")
STRUCTURE = ("residual", "tied", "frozen", "left_out", "unused", "rewrites_batch", "inner_backward")
CHECKPOINTS = ("checkpoint", "reentrant_checkpoint")
TRAITS = (*MOVING, *HOOKS, *STRUCTURE, *CHECKPOINTS)
FEATURES = (*LAYERS, *TRAITS)

# Derivatives that torch gets wrong, or does not have: an answer is right, or refused in words.
REFUSABLE = {
    "clipping_hook",
    "scaling_backward_hook",
    "tensor_hook",
    "reentrant_checkpoint",
    "hardsigmoid",
    "spectral_norm",
    "weight_norm",
    "embedding",
}

# Batches


class Graph:
    """A class of its own, known to nobody, as batches of graph libraries are."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def to(self, device: Any, **options: Any) -> Graph:
        return Graph(self.x.to(device, **options), self.y.to(device, **options))


BATCHES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "tuple": lambda x, y: (x, y),
    "dict": lambda x, y: {"x": x, "y": y},
    "named_tuple": Point,
    "dataclass": Example,
    "own_class": Graph,
}


def unpacked(batch: Any) -> tuple[Tensor, Tensor]:
    if isinstance(batch, dict):
        return batch["x"], batch["y"]
    return tuple(batch) if isinstance(batch, (tuple, list)) else (batch.x, batch.y)


def rewrite(batch: Any, x: Tensor) -> None:
    """Changes the inputs of a batch: by another tensor where the class allows it, else in place."""
    if isinstance(batch, dict):
        batch["x"] = x
    elif isinstance(batch, (tuple, list)):
        batch[0].copy_(x)
    else:
        batch.x = x


# The network


@dataclass(frozen=True)
class Description:
    """All that a network, its data and its training are made from."""

    layers: tuple[str, ...] = ()
    traits: tuple[str, ...] = ()
    loss: str = "cross_entropy"
    precision: str = "32-true"
    batch: str = "tuple"
    optimizer: str = "SGD"
    batches: int = 3
    batch_size: int = 8
    seed: int = 0

    def has(self, *names: str) -> bool:
        return bool({*self.layers, *self.traits} & set(names))

    @property
    def may_be_refused(self) -> bool:
        return self.has(*REFUSABLE)

    @property
    def is_smooth(self) -> bool:
        """Whether the loss has no kink that a step of finite differences may cross."""
        return not self.has("relu", "codebook", "inner_backward")

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64 if self.precision == "64-true" else torch.float32

    def data(self, seed: int, batches: int) -> DataLoader[Any]:
        """Returns a loader whose batches are new objects each time."""
        generator = torch.Generator().manual_seed(1000 * self.seed + seed)
        x = torch.randn(batches * self.batch_size, WIDTH, generator=generator)
        y = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()

        def collate(indices: list[int]) -> Any:
            return BATCHES[self.batch](x[indices].clone(), y[indices].clone())

        return DataLoader(range(len(x)), self.batch_size, collate_fn=collate)  # type: ignore[arg-type]


class Problem(nn.Module):
    """A network with its losses as functions of a batch and of hyperparameters: input scales [4], a log decay []."""

    plain = False  # True: without checkpoints and without hooks that change gradients

    def __init__(self, description: Description) -> None:
        super().__init__()
        torch.manual_seed(description.seed)
        self.description = description
        self.body = nn.Sequential(*(LAYERS[name]() for name in description.layers))
        self.head = nn.Linear(WIDTH, CLASSES)
        self.moving = nn.ModuleList(MOVING[name]() for name in description.traits if name in MOVING)
        self.first = nn.Linear(WIDTH, WIDTH) if description.has("frozen", "left_out", "tied") else nn.Identity()
        self.tied = nn.Linear(WIDTH, WIDTH) if description.has("tied") else nn.Identity()
        self.calls = self.backward_calls = 0
        if description.has("tied"):
            self.tied.weight = self.first.weight
        if description.has("unused"):
            self.unused = nn.Parameter(torch.randn(5) * 100)
        if description.has("frozen"):
            self.first.requires_grad_(False)
        self._add_hooks()

    def _add_hooks(self) -> None:
        if self.description.has("counting_hook"):
            self.head.register_forward_hook(_count)
        if self.description.has("counting_backward_hook"):
            self.head.register_full_backward_hook(_count_backward)
        if self.description.has("clipping_hook"):
            for parameter in self.weights():
                parameter.register_hook(_clip)
        if self.description.has("scaling_backward_hook"):
            self.head.register_full_backward_hook(_halve)

    def weights(self) -> list[nn.Parameter]:
        """Returns the weights that require a gradient."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def moved(self) -> list[nn.Parameter]:
        """Returns the weights that the optimizer moves."""
        left_out = set(self.first.parameters()) if self.description.has("left_out") else set()
        return [parameter for parameter in self.weights() if parameter not in left_out]

    def features(self, x: Tensor) -> Tensor:
        has, body = self.description.has, self.body
        x = self.tied(torch.tanh(self.first(x)))
        if has("checkpoint") and not self.plain:
            h = checkpoint(body, x, use_reentrant=False)
        elif has("reentrant_checkpoint") and not self.plain:
            h = checkpoint(body, x.clone().requires_grad_() if x.is_leaf else x, use_reentrant=True)
        else:
            h = body(x)
        if has("tensor_hook") and not self.plain and h.requires_grad:
            h.register_hook(lambda gradient: 0.1 * gradient)
        return x + h if has("residual") else h

    def attacked(self, x: Tensor) -> Tensor:
        """Moves inputs to where the loss is larger, by a backward pass of its own."""
        adversarial = x.detach().clone().requires_grad_()
        with torch.enable_grad():
            self.head(self.features(adversarial)).logsumexp(1).mean().backward()
        return x + 0.1 * adversarial.grad.sign()

    def inner(
        self, batch: Any, scale: Tensor, log_decay: Tensor | None, mark: Callable[[Tensor], Tensor] = mark_outputs
    ) -> Tensor:
        x, y = unpacked(batch)
        x = x.to(self.head.weight)
        if self.description.has("rewrites_batch"):
            rewrite(batch, 1.5 * x)
            x = unpacked(batch)[0].to(x)
        x = x * scale
        if self.description.has("inner_backward"):
            x = self.attacked(x)
        h = self.features(x)
        logits = mark(self.head(h))
        loss = self._data_loss(logits, y) + sum(term(h) for term in self.moving)
        if log_decay is not None:
            loss = loss + log_decay.exp() * sum(weight.square().sum() for weight in self.weights())
        return loss

    def outer(self, batch: Any, scale: Tensor) -> Tensor:
        x, y = unpacked(batch)
        return self._data_loss(self.head(self.features(x.to(self.head.weight) * scale)), y)

    def _data_loss(self, logits: Tensor, y: Tensor) -> Tensor:
        if self.description.loss == "mse":
            return F.mse_loss(logits, F.one_hot(y, CLASSES).to(logits))
        return F.cross_entropy(logits, y)


def _count(module: nn.Module, inputs: Any, output: Any) -> None:
    module.calls = getattr(module, "calls", 0) + 1


def _count_backward(module: nn.Module, *gradients: Any) -> None:
    module.backward_calls = getattr(module, "backward_calls", 0) + 1


def _clip(gradient: Tensor) -> Tensor:
    return gradient.clamp(-0.02, 0.02)


def _halve(module: nn.Module, grad_input: Any, grad_output: Any) -> Any:
    return tuple(None if gradient is None else gradient / 2 for gradient in grad_input)


class RandomBilevel(BilevelLightningModule, L.LightningModule):
    """The problem as a user's module, whose hyperparameters stay as they are."""

    def __init__(self, description: Description) -> None:
        super().__init__()
        self.problem = Problem(description)
        self.register_hyperparameter("scale", torch.linspace(0.8, 1.2, WIDTH))
        if description.loss == "penalty":
            self.register_hyperparameter("log_decay", torch.tensor(-3.0))
        self.description = description

    def inner_loss(self, batch: Any) -> Tensor:
        listen(self, "inner")
        return self.problem.inner(batch, self.scale, getattr(self, "log_decay", None))

    def outer_loss(self, batch: Any) -> Tensor:
        listen(self, "outer")
        return self.problem.outer(batch, self.scale)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.inner_loss(batch)

    def configure_optimizers(self) -> Any:
        options: dict[str, dict[str, Any]] = {
            "SGD": {"lr": 0.1},
            "momentum": {"lr": 0.05, "momentum": 0.9},
            "AdamW": {"lr": 0.01, "weight_decay": 0.0},
        }
        optimizer = torch.optim.AdamW if self.description.optimizer == "AdamW" else torch.optim.SGD
        return optimizer(self.problem.moved(), **options[self.description.optimizer])

    def configure_hyper_optimizer(self) -> Any:
        return Resting(self)

    def train_dataloader(self) -> Any:
        return self.description.data(1, self.description.batches)

    def outer_dataloader(self) -> Any:
        return self.description.data(2, 1)


@st.composite
def descriptions(draw: Any, feature: str) -> Description:
    """Draws networks that have a feature, at most 80 weights, and up to two further layers and one further trait."""
    layers = draw(st.lists(st.sampled_from(list(LAYERS)), max_size=2, unique=True))
    traits = draw(st.lists(st.sampled_from(TRAITS), max_size=1))
    if feature in LAYERS and feature not in layers:
        layers.insert(draw(st.integers(0, len(layers))), feature)
    if feature in TRAITS:
        traits = [feature, *(trait for trait in traits if trait != feature)]
    if {*CHECKPOINTS} & {*traits} and not any(LAYERS[name]().state_dict() for name in layers):
        layers.append("linear")  # a checkpoint around weights
    return Description(
        tuple(layers),
        tuple(traits),
        loss=draw(st.sampled_from(["cross_entropy", "mse", "penalty"])),
        precision=draw(st.sampled_from(["32-true", "64-true", "bf16-mixed"])),
        batch=draw(st.sampled_from(list(BATCHES))),
        optimizer=draw(st.sampled_from(["SGD", "momentum", "AdamW"])),
        batches=draw(st.integers(2, 4)),
        batch_size=draw(st.integers(4, 8)),
        seed=draw(st.integers(0, 99)),
    )
