"""The curvature that can be trusted on the first batch: the one that was asked for, or finite differences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.pytorch.utilities.memory import is_oom_error
from torch import Tensor

from lightning_ifthpo.core.consistency import follows_its_gradient
from lightning_ifthpo.core.graph import SecondDerivativeError
from lightning_ifthpo.core.loss import Loss
from lightning_ifthpo.curvature.base import LossOperator
from lightning_ifthpo.curvature.gauss_newton import GaussNewtonOperator
from lightning_ifthpo.curvature.kinds import curvature_operator
from lightning_ifthpo.curvature.verification import (
    AsymmetricCurvatureError,
    Structure,
    check_complete,
    check_symmetric,
    verified_operator,
)
from lightning_ifthpo.runtime.losses import ModuleLosses
from lightning_ifthpo.runtime.telling import rank_zero_warn

# 10 √eps of bfloat16: under autocast the operator's dtype does not show the precision of its products.
_HALF = 0.9
# Kernels that are not deterministic change a loss by some of float32's eps, and never by this much.
_SAME = 1e-3
# Differences of gradients of a smooth network are symmetric to 1e-3 in float32.
_SYMMETRIC = 0.05


def trusted_operator(
    losses: ModuleLosses, loss: Loss, curvature: Any, user: str, hyperparameters: Sequence[Tensor] = ()
) -> tuple[LossOperator, Any]:
    """Returns the operator of a loss and the name of its curvature, after checking derivatives.

    Finite differences replace a curvature that cannot be trusted, with a warning. A loss that does not follow its
    gradient, in the weights or in hyperparameters, is reported too. Call it inside a session. Later losses of `losses`
    are not checked again.

    Args:
        losses: The losses of the module.
        loss: The inner loss on the first batch.
        curvature: Name of the curvature; "auto" takes Gauss–Newton if the loss marks outputs, else the Hessian.
        user: Name of the callback, for the warning.
        hyperparameters: Those that the loss is differentiated by; they require a gradient.

    Raises:
        ValueError: If the loss is not finite.
        SecondDerivativeError: If finite differences cannot replace the curvature: in half precision, because the
            gradient is not that of a function, or because `torch.autograd.grad` does not find all of it.

    Cost: 1.3 gradients, .3 for hyperparameters, and see `verified_operator`.
    """
    structure = check_complete(loss)
    if not bool(structure.value.isfinite()):
        value = float(structure.value)
        raise ValueError(f"{loss.name} is {value} on the first batch; check the data and the initial weights")
    if curvature == "auto":
        curvature = "gauss_newton" if structure.marks_outputs else "hessian"
    # before there is an operator, whose graph does not survive that something moves
    by_hyperparameters = losses.has_low_precision or _follows_in(hyperparameters, loss, structure)
    try:
        tolerance = _HALF if losses.has_low_precision else None
        operator, follows = verified_operator(curvature, loss, structure, tolerance=tolerance)
    except (RuntimeError, AttributeError, TypeError) as error:  # a hook may not be made for products
        if curvature == "finite_difference" or is_oom_error(error) or losses.has_low_precision:
            raise
        if isinstance(error, AsymmetricCurvatureError):
            _check_differences(loss, error)
        cause = error.cause if isinstance(error, SecondDerivativeError) else f"{type(error).__name__}: {error}"
        rank_zero_warn(
            f"{user} uses curvature='finite_difference' in place of {curvature!r}: {cause}. Differences are noisy "
            "where gradients jump, as with ReLU"
        )
        curvature = "finite_difference"
        operator, follows = verified_operator(curvature, loss, structure)
    values = float(structure.value), float(operator.loss)
    for doubt in _doubts(values, follows=follows, by_hyperparameters=by_hyperparameters):
        rank_zero_warn(f"{user}: {loss.name} {doubt}")
    losses.forward_mode = isinstance(operator, GaussNewtonOperator) and operator.uses_forward_mode
    losses.is_verified = True
    return operator, curvature


def _follows_in(hyperparameters: Sequence[Tensor], loss: Loss, structure: Structure) -> bool:
    """Returns whether a loss follows its gradient in the hyperparameters, if there are any."""
    if not hyperparameters:
        return True
    by_hyperparameters = loss.over(hyperparameters)
    slopes = map(structure.slopes.get, hyperparameters)
    gradient = loss.combine(by_hyperparameters.space.flatten(slopes))
    return follows_its_gradient(by_hyperparameters, gradient, structure.value)


def _doubts(values: tuple[float, float], *, follows: bool, by_hyperparameters: bool) -> list[str]:
    """Returns what is wrong with a loss, from two of its values and whether it follows its gradients."""
    first, again = values
    if abs(again - first) > _SAME * abs(again):  # the other checks compare values, too
        return [
            f"is not the same function twice: {first:.6g} and {again:.6g} for the same weights, batch and random "
            "numbers. It reads something that an evaluation changes and that cannot be put back, such as a global "
            "variable, a file or a generator outside of the module"
        ]
    doubts = {
        "does not change along its gradient as the gradient says, as where a part of it is detached or a backward pass "
        "is not the derivative. Its curvature takes that part for constant": follows,
        "does not change with the hyperparameters as its derivative says, as where a part that depends on them is "
        "detached. Hypergradients take that part for constant": by_hyperparameters,
    }
    return [doubt for doubt, is_right in doubts.items() if not is_right]


def _check_differences(loss: Loss, error: AsymmetricCurvatureError) -> None:
    """Raises the error unless differences of gradients are symmetric, so that only torch's derivatives are wrong."""
    try:
        check_symmetric(curvature_operator("finite_difference", loss, loss.parameters), loss.name, _SYMMETRIC)
    except AsymmetricCurvatureError:
        raise error from None
