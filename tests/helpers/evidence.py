"""What a training run leaves behind with and without a callback, and what the callback measured from.

Modules under test have an attribute `problem`, with all state of the losses and a method `moved()` that returns the
weights; they call `listen` at the beginning of each evaluation of a loss, and their hyper-optimizer is `Resting`.
"""

from __future__ import annotations

import copy
import random
import re
import warnings
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn

from lightning_ifthpo import ExactGeN
from tests.helpers.device import DEVICE, ON_CUDA, RandomState, random_state
from tests.helpers.trainers import Callback, quiet_trainer, same

# what torch and Lightning say of a machine, in the first run or in some runs only
OF_THE_MACHINE = re.compile("does not have many workers|no current CUDA context|deterministic")


@dataclass
class Measurement:
    """What a measurement begins with.

    Attributes:
        problem: A copy of the module's problem.
        batch: A copy of the training batch.
        weights: All moving weights, [n], before the last two optimizer steps, or before the first.
        random_states: Those in which the inner and the outer loss were evaluated, each once.
    """

    problem: Any
    batch: Any
    weights: list[Tensor]
    random_states: dict[str, list[RandomState]] = field(default_factory=dict)

    def pairs_of_random_states(self) -> list[tuple[RandomState, RandomState | None]]:
        """Returns the random states of the inner loss with those of the outer loss, if that was evaluated."""
        seen = self.random_states
        return [(inner, outer) for inner in seen["inner"] for outer in seen.get("outer", [None])]


@dataclass
class Evidence:
    """What a run leaves behind after each batch, its hypergradients, and what its last measurement began with."""

    traces: list[Any] = field(default_factory=list)
    hypergradients: list[list[Tensor]] = field(default_factory=list)
    batch: Any = None
    weights: list[Tensor] = field(default_factory=list)
    present: Measurement | None = None
    last: Measurement | None = None

    def begin(self, module: Any) -> None:
        """Keeps what a measurement that may follow should see."""
        self.present = Measurement(copy.deepcopy(module.problem), self.batch, self.weights)

    def listen(self, name: str) -> None:
        """Notes the random state with which a loss is evaluated in a measurement."""
        if self.present is None:
            return
        self.last = self.present
        known, state = self.present.random_states.setdefault(name, []), random_state()
        if not any(same(state, other) for other in known):
            known.append(state)


# Outside of the modules, whose attributes callbacks put back
EVIDENCE: WeakKeyDictionary[nn.Module, Evidence] = WeakKeyDictionary()


def listen(module: nn.Module, name: str) -> None:
    """Call this at the beginning of each evaluation of the "inner" or "outer" loss of a module."""
    EVIDENCE[module].listen(name)


class Resting(torch.optim.SGD):
    """A hyper-optimizer that moves nothing, and keeps the hypergradients that it is given."""

    def __init__(self, module: Any) -> None:
        super().__init__(module.hyperparameters(), lr=0.0)
        self.evidence = EVIDENCE[module]

    def step(self, closure: Any = None) -> None:
        self.evidence.hypergradients.append([p.grad.clone() for group in self.param_groups for p in group["params"]])
        super().step(closure)


class First(Callback):
    """Stands before the callback under test."""

    def __init__(self, evidence: Evidence, *, looks_before_step: bool) -> None:
        self.evidence, self.looks_before_step = evidence, looks_before_step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.evidence.batch = copy.deepcopy(batch)
        weights = torch.cat([weight.detach().reshape(-1) for weight in pl_module.problem.moved()])
        self.evidence.weights = [*self.evidence.weights[-1:], weights]
        if self.looks_before_step:
            self.evidence.begin(pl_module)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if not self.looks_before_step:
            self.evidence.begin(pl_module)


class Last(Callback):
    """Stands behind it."""

    def __init__(self, evidence: Evidence) -> None:
        self.evidence = evidence

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.evidence.present = None

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.evidence.present = None
        self.evidence.traces.append(trace_of(pl_module))


def trace_of(module: Any) -> dict[str, Any]:
    """Returns all that a callback must leave as it is."""
    return {
        "state": {name: value.clone() for name, value in module.state_dict().items()},
        "gradients": [None if p.grad is None else p.grad.to_dense(masked_grad=False) for p in module.parameters()],
        "modes": [submodule.training for submodule in module.modules()],
        "python": [plain_values(vars(submodule)) for submodule in module.problem.modules()],
        "random": [*random_state(), random.getstate(), plain_values(np.random.get_state())],  # noqa: NPY002
    }


def plain_values(value: Any) -> Any:
    """Returns a copy of numbers, tensors, containers and generators; other objects as None."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, torch.Generator):
        return value.get_state()
    if isinstance(value, np.random.Generator):
        return repr(value.bit_generator.state)
    if isinstance(value, SimpleNamespace):
        return plain_values(vars(value))
    if isinstance(value, dict):
        return {k: plain_values(v) for k, v in value.items() if isinstance(k, str) and k != "_modules"}
    if isinstance(value, (list, tuple, deque, np.ndarray)):
        return [plain_values(v) for v in value]
    return value if isinstance(value, (int, float, str)) else None


@dataclass
class Run:
    """A training run with a callback: its module, evidence, error, warnings and metrics."""

    module: Any
    evidence: Evidence
    error: Exception | None
    warnings: set[str]
    metrics: dict[str, float]
    repeated: Callable[[], Run]

    @classmethod
    def of(
        cls,
        make: Callable[[], L.LightningModule],
        callback: L.Callback | None,
        *,
        precision: str,
        seed: int = 0,
    ) -> Run:
        """Trains for one epoch."""
        module = make()
        evidence = EVIDENCE[module] = Evidence()
        first = First(evidence, looks_before_step=isinstance(callback, ExactGeN))
        callbacks = [first, *([callback] if callback else []), Last(evidence)]
        torch.manual_seed(seed)
        trainer = quiet_trainer(callbacks=callbacks, precision=precision, limit_val_batches=0)
        error, said = attempted(lambda: trainer.fit(module))
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items()}
        return cls(
            module, evidence, error, said, metrics, lambda: cls.of(make, callback, precision=precision, seed=seed)
        )

    @property
    def hyperparameters(self) -> dict[str, Tensor]:
        return {name: value.detach().clone().to(DEVICE) for name, value in self.module.named_hyperparameters()}


def attempted(function: Callable[[], Any]) -> tuple[Exception | None, set[str]]:
    """Returns the error that a function raises, if any, and its warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            function()
            error = None
        except Exception as raised:
            error = raised
    said = {str(warning.message) for warning in caught}
    return error, {message for message in said if not OF_THE_MACHINE.search(message)}


def disturbed(plain: Run, run: Run, *, but_weights: bool) -> str:
    """Returns what differs from plain training, and where."""
    kinds = {"modes", "random"} if but_weights else {"state", "gradients", "modes", "python", "random"}
    found = differing(plain, run, kinds)
    if found and ON_CUDA:  # some kernels add in another order each time: then bits say nothing
        unsteady = {kind for _ in range(3) for kind, _ in differing(plain, plain.repeated(), kinds)}
        found = [(kind, batch) for kind, batch in found if kind not in unsteady]
    return f"training was disturbed: {', '.join(f'{kind} after batch {i}' for kind, i in found)}" if found else ""


def differing(left: Run, right: Run, kinds: set[str]) -> list[tuple[str, int]]:
    """Returns the kinds of traces that differ, with the batches after which they do."""
    pairs = enumerate(zip(left.evidence.traces, right.evidence.traces, strict=True))
    return [(kind, i) for i, (a, b) in pairs for kind in sorted(kinds) if not same(a[kind], b[kind])]
