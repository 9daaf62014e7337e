"""Architectures and losses that people train: hypergradients as by differences, and training does not notice."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from unittest.mock import patch

import lightning as L
import pytest
import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_ifthpo import BilevelLightningModule, IFTHypergradient, SharpnessMonitor
from lightning_ifthpo.solvers import MinimumResidual
from tests.helpers.device import DEVICE, RandomState, set_random_state
from tests.helpers.evidence import Resting, Run, disturbed, listen
from tests.helpers.zoo import EXAMPLES, ZOO, Member
from tests.helpers.zoo_vision import VISION
from tests.system.test_properties import said_by_us

pytestmark = pytest.mark.slow

MEMBERS = ZOO | VISION
BATCHES = 3

# Relative to the norm of the weights. The first is near the cube root of eps, for smooth losses. The second is for
# losses with many kinks, none of which a step may cross: mobilenet_v2 still has some at 1e-9. Their curvature is so
# large that rounding does not matter.
STEPS = (1e-6, 1e-11)


class Fresh(Dataset[Any]):
    """Batches that are new objects each time."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Any:
        return copy.deepcopy(self.batches[index])


class ZooModule(BilevelLightningModule, L.LightningModule):
    def __init__(self, make: Callable[[], Member]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.problem = make()
        self.batches = [self.problem.batch() for _ in range(BATCHES + 1)]
        self.register_hyperparameter("weights", torch.linspace(0.8, 1.2, EXAMPLES))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        listen(self, "inner")
        return self.problem.inner(batch, self.weights)

    def outer_loss(self, batch: Any) -> Tensor:
        listen(self, "outer")
        return self.problem.outer(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.problem.moved(), lr=0.01)

    def configure_hyper_optimizer(self) -> Any:
        return Resting(self)

    def train_dataloader(self) -> Any:
        return DataLoader(Fresh(self.batches[1:]), batch_size=None)

    def outer_dataloader(self) -> Any:
        return DataLoader(Fresh(self.batches[:1]), batch_size=None)


@dataclass
class Differences:
    """The hypergradient by two iterations of MINRES, from `.backward()` alone, on copies of a member in float64.

    Two iterations have no step size to choose, and do not mind an indefinite Hessian.

    Args:
        member: As it stood at the measurement, with its buffers and modes.
        hyper: The hyperparameter, [4].
        batch: The training batch.
        outer_batch: The outer batch.
        random_state: That in which the inner loss was evaluated.
        outer_random_state: That of the outer loss.
    """

    member: Member
    hyper: Tensor
    batch: Any
    outer_batch: Any
    random_state: RandomState
    outer_random_state: RandomState

    def hypergradient(self, step: float, *, of_values: bool = False) -> Tensor:
        """Returns −(∂g/∂λ)ᵀ q, [4], with the q of least ‖Hq − v‖ among the combinations of v and Hv.

        With `of_values`, the mixed derivative is that of the loss's value: the same, unless the gradient is that of no
        loss.
        """
        v = self.slope(outer=True)[0]
        image = self.product(v, step)[0]
        images = torch.stack([image, self.product(image, step)[0]], 1)
        shares = torch.linalg.lstsq(images.cpu(), v[:, None].cpu()).solution[:, 0]  # CUDA's takes full rank for granted
        q = torch.stack([v, image], 1) @ shares.to(v)
        return -self.product(q, step)[1] if of_values else -self.mixed.T @ q

    @cached_property
    def mixed(self) -> Tensor:
        """∂g/∂λ for the gradient g = ∂L_T/∂w, [n, 4]; g is linear in λ."""
        return torch.stack([self.slope(hyper=unit)[0] for unit in torch.eye(EXAMPLES, device=DEVICE)], 1)

    def product(self, v: Tensor, step: float) -> tuple[Tensor, Tensor]:
        """Returns the derivatives of ∂L_T/∂w, [n], and of ∂L_T/∂λ, [4], along v."""
        length = step * float(torch.linalg.vector_norm(flat_weights(self.member)) / torch.linalg.vector_norm(v))
        ends = [self.slope(sign * length * v) for sign in (1.0, -1.0)]
        return tuple((first - second) / (2 * length) for first, second in zip(*ends, strict=True))

    def slope(
        self, delta: Tensor | None = None, *, hyper: Tensor | None = None, outer: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Returns ∂L/∂w, [n], and ∂L/∂λ, [4], of the inner or the outer loss at w + delta, as training would."""
        hyper = (self.hyper if hyper is None else hyper).clone().requires_grad_()
        member = copy.deepcopy(self.member)
        weights = member.moved()
        if delta is not None:
            with torch.no_grad():
                for weight, part in zip(weights, delta.split([w.numel() for w in weights]), strict=True):
                    weight += part.view_as(weight)
        set_random_state(self.outer_random_state if outer else self.random_state)
        with (
            torch.backends.cudnn.flags(enabled=False),  # whose recurrence has no derivative in eval mode
            patch.object(torch, "_weight_norm", weight_norm),
        ):
            if outer:
                loss = member.eval().outer(copy.deepcopy(self.outer_batch))
            else:
                loss = member.inner(copy.deepcopy(self.batch), hyper)
        for weight in weights:
            weight.grad = None  # what a backward pass inside the loss has left
        loss.backward()
        slopes = [torch.zeros_like(w) if w.grad is None else w.grad for w in weights]
        return torch.cat([slope.to_dense().reshape(-1) for slope in slopes]), hyper.grad


def weight_norm(v: Tensor, g: Tensor, dim: int) -> Tensor:
    """Returns gv / ‖v‖, with a norm for each index of one dimension, in the precision of v.

    CUDA's own takes the square root in float32, also for float64: an error of 3e-8, too much for differences over 1e-6.
    """
    return v * (g / torch.linalg.vector_norm(v, dim=[d for d in range(v.ndim) if d != dim], keepdim=True))


def flat_weights(member: Member) -> Tensor:
    return torch.cat([weight.detach().reshape(-1) for weight in member.moved()])


def compared(run: Run, *, by_differences: bool) -> str:
    """Returns what is wrong with the last hypergradient, or nothing."""
    got = run.evidence.hypergradients[-1][0]
    last, outer_batch, errors = run.evidence.last, next(iter(run.module.outer_dataloader())), []
    bound = 1e-2 if by_differences else 1e-4  # differences of the package may cross kinks
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # as the Trainer does with precision="64-true"
    try:
        for states in last.pairs_of_random_states():
            batches = converted(last.batch), converted(outer_batch)
            reference = Differences(last.problem, run.hyperparameters["weights"], *batches, *states)
            for step, of_values in itertools.product(STEPS, {False, by_differences}):
                wanted = reference.hypergradient(step, of_values=of_values)
                errors.append(float((got - wanted).norm() / wanted.norm()))
                if errors[-1] < bound:
                    return ""
    finally:
        torch.set_default_dtype(default)
    return f"relative errors {errors}: got {got}"


def converted(batch: Any) -> Any:
    return move_data_to_device(L.pytorch.plugins.DoublePrecision().convert_input(copy.deepcopy(batch)), DEVICE)


def ended(plain: Run, run: Run, *, may_be_refused: bool) -> str:
    """Returns "answered" or "refused"; raises AssertionError if training was disturbed, or failed without a word."""
    assert plain.error is None, plain.error
    said = run.warnings - plain.warnings
    if run.error is not None:
        assert said_by_us(run.error), f"{type(run.error).__name__}: {run.error}"
        assert may_be_refused, f"refused: {run.error}"
        return "refused"
    differing = disturbed(plain, run, but_weights=False)
    assert not differing, differing
    if run.metrics.get("sharpness/failures") or run.metrics.get("hypergrad/skipped"):
        assert said, "failed without a warning"
        assert may_be_refused, f"failed: {said}"
        return "refused"
    return "answered"


@pytest.mark.parametrize("name", MEMBERS)
def test_a_hypergradient_is_that_of_differences_of_gradients(name, record_property):
    def make() -> ZooModule:
        return ZooModule(MEMBERS[name])

    plain = Run.of(make, None, precision="64-true")
    member = plain.module.problem
    solver = MinimumResidual(max_iterations=2)
    callback = IFTHypergradient(2, curvature="hessian", solver=solver, on_failure="use")  # also a doubtful outer loss
    run = Run.of(make, callback, precision="64-true")
    outcome = ended(plain, run, may_be_refused=member.may_be_refused)
    said = run.warnings - plain.warnings
    if any("does not change along its gradient" in message for message in said):
        assert member.may_be_refused, said
        outcome = "said to take a part for constant"
    if outcome == "answered":
        wrong = compared(run, by_differences=any("difference" in message for message in said))
        if wrong and any("Differences are noisy where gradients jump" in message for message in said):
            outcome = "said to be noisy"  # kinks, which a step of the package crosses
        else:
            assert not wrong, wrong
    record_property("outcome", outcome)


@pytest.mark.parametrize("name", MEMBERS)
def test_a_monitor_leaves_no_trace(name, record_property):
    def make() -> ZooModule:
        return ZooModule(MEMBERS[name])

    plain = Run.of(make, None, precision="32-true")
    monitor = SharpnessMonitor(2, max_iterations=3, max_overhead=None)
    run = Run.of(make, monitor, precision="32-true")
    record_property("outcome", ended(plain, run, may_be_refused=plain.module.problem.may_be_refused))
