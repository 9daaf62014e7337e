"""What a hypergradient is made of, and what is known of its quality."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

from lightning_ifthpo.core.autodiff import vjp
from lightning_ifthpo.core.loss import LossValue, check_loss, loss_and_outputs
from lightning_ifthpo.core.space import ParameterSpace
from lightning_ifthpo.curvature import AllReduce
from lightning_ifthpo.curvature.distributed import summed
from lightning_ifthpo.solvers import SolveResult, Status

Loss: TypeAlias = Callable[[], LossValue]


@dataclass(frozen=True)
class Hypergradient:
    """dL_V/dλ and what is known of its quality.

    Attributes:
        direct: ∂L_V/∂λ, shaped like the hyperparameters.
        indirect: −(∂²L_T/∂w∂λᵀ)ᵀ q with q ≈ H⁻¹ ∂L_V/∂w, shaped like the hyperparameters.
        outer_loss: L_V, a scalar.
        solution: How q was found; `solution.x` is q, [n].
        diagnosis: Why the solve failed and what to do; empty where it did not.
        unused: Indices of hyperparameters that enter neither loss; their gradients are zero.
    """

    direct: list[Tensor]
    indirect: list[Tensor]
    outer_loss: Tensor
    solution: SolveResult
    diagnosis: str = ""
    unused: tuple[int, ...] = ()

    @property
    def gradients(self) -> list[Tensor]:
        """Direct plus indirect term, shaped like the hyperparameters."""
        return [direct + indirect for direct, indirect in zip(self.direct, self.indirect, strict=True)]

    @property
    def relative_residual(self) -> float:
        """‖Hq − v‖ / ‖v‖ of the linear solve."""
        return self.solution.relative_residual

    @property
    def products(self) -> int:
        """Curvature products that the solution is made of."""
        return self.solution.products

    @property
    def status(self) -> Status:
        """How the linear solve ended; NONFINITE if anything else came out as NaN or infinity."""
        return self.solution.status


@dataclass(frozen=True)
class OuterGradient:
    """L_V, v = ∂L_V/∂w as a flat vector and ∂L_V/∂λ, detached."""

    value: Tensor
    v: Tensor
    direct: list[Tensor | None]

    @classmethod
    def of(cls, loss: Loss, space: ParameterSpace, hyperparameters: Sequence[Tensor]) -> OuterGradient:
        """Returns those of a loss, by one gradient."""
        value, _ = loss_and_outputs(loss())
        check_loss(value, "the outer loss")
        gradients = vjp([value], [*space.tensors, *hyperparameters])
        count = len(space.tensors)
        return cls(value.detach(), space.flatten(gradients[:count]), gradients[count:])

    def summed(self, hyperparameters: Sequence[Tensor], all_reduce: AllReduce) -> OuterGradient:
        """Returns those of the sum of all processes' losses, by one collective."""
        parts = [self.value, self.v, *self.direct]
        value, v, *direct = summed(parts, [self.value, self.v, *hyperparameters], all_reduce)
        assert value is not None
        assert v is not None
        return OuterGradient(value, v, direct)


def assembled(
    outer: OuterGradient,
    hyperparameters: Sequence[Tensor],
    mixed: Sequence[Tensor | None],
    inner_losses: Sequence[Tensor],
    solution: SolveResult,
) -> Hypergradient:
    """Puts both terms together; NaN or infinity anywhere shows in the status."""
    direct = [torch.zeros_like(h) if d is None else d for h, d in zip(hyperparameters, outer.direct, strict=True)]
    indirect = [torch.zeros_like(h) if m is None else -m for h, m in zip(hyperparameters, mixed, strict=True)]
    if not all(bool(torch.isfinite(t).all()) for t in [outer.value, *inner_losses, *direct, *indirect]):
        solution = replace(solution, status=Status.NONFINITE)
    pairs = zip(outer.direct, mixed, strict=True)
    unused = tuple(index for index, (d, m) in enumerate(pairs) if d is None and m is None)
    return Hypergradient(direct, indirect, outer.value, solution, unused=unused)


def check_used(result: Hypergradient, hyperparameters: Sequence[Tensor], allow_unused: bool) -> None:
    """Raises ValueError if a hyperparameter enters neither loss, unless that is allowed."""
    if result.unused and not allow_unused:
        index = result.unused[0]
        raise ValueError(
            f"hyperparameter {index}, of shape {tuple(hyperparameters[index].shape)}, does not influence the gradient "
            "of the inner loss, nor the outer loss, so that implicit differentiation cannot tune it; for a learning "
            "rate, ExactGeN or a sweep is the tool. Pass allow_unused=True to get zeros"
        )
