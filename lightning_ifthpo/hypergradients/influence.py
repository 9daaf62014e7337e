"""Which training examples matter: what leaving one out does to a test loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TypeAlias

import torch
from torch import Tensor, nn

from lightning_ifthpo.core.autodiff import gradients_on
from lightning_ifthpo.core.loss import Loss, LossFunction, as_loss
from lightning_ifthpo.core.space import check_real
from lightning_ifthpo.curvature.kinds import Curvature
from lightning_ifthpo.hypergradients.implicit import implicit_hypergradient
from lightning_ifthpo.hypergradients.result import Hypergradient
from lightning_ifthpo.solvers import ConjugateGradient, Solver, Status

LossesFunction: TypeAlias = Callable[[], Tensor | tuple[Tensor, Tensor | Sequence[Tensor]]]
"""Returns one loss for each example, [N], or (losses, outputs of the model)."""


@dataclass(frozen=True, repr=False)
class Influence(Hypergradient):
    """The hypergradient of a test loss in the weights of the training examples, and what it says of their removal."""

    @property
    def removal(self) -> Tensor:
        """Predicted change of the test loss when one example is left out, [N], in units of the test loss.

        Where it is positive, the test loss grows without the example, so that the example helps; where it is negative,
        the example harms. The sum over a few examples is the prediction for leaving them out together. It is NaN if the
        status is NONFINITE.
        """
        if self.status is Status.NONFINITE:
            return torch.full_like(self.gradients[0], math.nan)
        return 0.0 - self.gradients[0]  # which is no −0 where an example has no effect

    def __repr__(self) -> str:
        removal = self.removal
        residual = "not measured" if self.relative_residual is None else f"{self.relative_residual:.1g}"
        parts = [
            f"removal of one of {len(removal)} examples: {removal.amin():.3g} to {removal.amax():.3g}",
            f"status: {self.status.value}",
            f"relative residual: {residual}",
        ]
        if self.diagnosis:
            parts.append(f"diagnosis: {self.diagnosis}")
        return f"Influence({', '.join(parts)})"


def influence(
    losses: LossesFunction,
    test_loss: LossFunction | Loss,
    parameters: Sequence[Tensor],
    *,
    penalty: Callable[[], Tensor] | None = None,
    curvature: Curvature = "hessian",
    solver: Solver = ConjugateGradient(max_iterations=100, rtol=1e-6),  # noqa: B008 - frozen
) -> Influence:
    """Returns removal_i = ∇l_iᵀ H⁻¹ ∇L_test / N for all N training examples, by one linear solve.

    This is the first-order change of the test loss L_test when example i is left out and the weights w move to the new
    minimum (Koh and Liang 2017, section 2.2). The training loss is Σ l_j / N + penalty, and H is its curvature. The
    other examples keep their weight 1 / N, and the penalty stays as it is. If retraining takes the mean over N − 1
    examples, add the penalty to each loss instead, so that removal takes 1 / N of the penalty away.

    It holds at a minimum of the training loss with a positive definite H, and where one example moves the weights
    little; `diagnosis` says if the weights are not at a minimum. It is computed as an implicit hypergradient, in the
    example weights s of Σ s_j l_j / N + penalty at s = 1, so that no gradient of a single example is needed.

    Args:
        losses: Callable without arguments that returns the losses l of all training examples, [N], the same examples
            at every call, or (losses, outputs).
        test_loss: L_test, a callable without arguments that returns a scalar tensor.
        parameters: w, together [n].
        penalty: Callable without arguments that returns what the training loss adds to the mean of the losses, a
            scalar tensor.
        curvature: The matrix H, as in `implicit_hypergradient`: "hessian"; "gauss_newton", which needs the model's
            outputs (`mark_outputs`) and is safer for networks; "finite_difference"; …
        solver: Solves the linear system. Damping stands for a penalty that is not part of the training loss.

    Raises:
        ValueError: If the losses do not have shape [N], or another N at another call, or depend on no parameter; or if
            the penalty or the test loss is not a scalar.
        TypeError: If they are not callables that return real floating-point tensors, or parameters is one tensor.

    Cost: one forward pass, and that of `implicit_hypergradient`. Memory: two graphs of all N examples; with
    curvature="finite_difference" one, and that of one chunk of examples if `losses` computes chunks inside
    `torch.utils.checkpoint`.

    >>> w = torch.tensor([3.0], requires_grad=True)  # the mean of y, which minimizes the mean of the losses
    >>> y = torch.tensor([1.0, 2.0, 6.0])
    >>> result = influence(lambda: (w - y) ** 2 / 2, lambda: (w**2).sum() / 2, [w])
    >>> result.removal  # without 6.0 the mean is closer to zero, which the test loss wants
    tensor([ 2.,  1., -3.])
    >>> result
    Influence(removal of one of 3 examples: -3 to 2, status: converged, relative residual: 0)
    """
    for name, function in (("losses", losses), ("test_loss", test_loss), ("penalty", penalty)):
        if not (callable(function) or isinstance(function, Loss) or (function is None and name == "penalty")):
            raise TypeError(
                f"expected {name} to be a callable without arguments, got {type(function).__name__}; write it as a "
                "function, such as lambda: …, that computes the value at each call"
            )
    if isinstance(parameters, (Tensor, nn.Module)):
        raise TypeError(
            f"expected parameters to be a sequence of tensors, such as list(model.parameters()), got "
            f"{type(parameters).__name__}"
        )
    parameters = list(parameters)  # also from a generator
    training = _WeightedLosses(losses, penalty)
    training_loss = Loss(training, parameters, name="the training loss")
    with gradients_on():
        training_loss.evaluate()  # shows N
    found = implicit_hypergradient(
        training_loss,
        as_loss(test_loss, parameters, "the test loss"),
        parameters,
        [training.weights],
        curvature=curvature,
        solver=solver,
        allow_unused=True,
    )
    if found.unused:
        raise ValueError("the losses depend on none of the parameters; pass the weights of the model they come from")
    return Influence(**{field.name: getattr(found, field.name) for field in fields(found)})


class _WeightedLosses:
    """Σ s_i l_i / N + penalty, a function without arguments.

    Attributes:
        weights: s, [N], ones; known after the first call.
    """

    weights: Tensor

    def __init__(self, losses: LossesFunction, penalty: Callable[[], Tensor] | None) -> None:
        self._losses = losses
        self._penalty = penalty

    def __call__(self) -> tuple[Tensor, Tensor | Sequence[Tensor]]:
        returned = self._losses()
        losses, outputs = returned if isinstance(returned, tuple) and len(returned) == 2 else (returned, ())
        losses = self._checked(losses)
        total = (self.weights * losses).mean()
        return (total if self._penalty is None else total + _scalar(self._penalty())), outputs

    def _checked(self, losses: Tensor) -> Tensor:
        """Returns the losses, if there is one for each example; the first ones say how many there are."""
        check_real(losses, "the losses")
        if losses.ndim != 1 or not len(losses):
            raise ValueError(
                f"the losses: expected one for each example, [N], got shape {tuple(losses.shape)}; use "
                "reduction='none', and take the mean or sum over all other dimensions"
            )
        if not hasattr(self, "weights"):
            self.weights = torch.ones_like(losses)
        if losses.shape != self.weights.shape:
            raise ValueError(
                f"the losses: expected the same {len(self.weights)} examples at every call, got {len(losses)}"
            )
        return losses


def _scalar(penalty: Tensor) -> Tensor:
    check_real(penalty, "the penalty")
    if penalty.numel() != 1:
        raise ValueError(f"the penalty: expected a scalar, got shape {tuple(penalty.shape)}; take its sum")
    return penalty
