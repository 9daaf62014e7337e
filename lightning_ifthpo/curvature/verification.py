"""Checks, on one batch, that the derivatives of a loss are those of the gradient that training follows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_ifthpo.core.autodiff import vjp
from lightning_ifthpo.core.graph import SecondDerivativeError, custom_functions, nodes
from lightning_ifthpo.core.loss import Loss
from lightning_ifthpo.core.random_state import Stream, generator_of
from lightning_ifthpo.core.step_length import natural_step, relative_step
from lightning_ifthpo.curvature.base import CurvatureOperator, LossOperator
from lightning_ifthpo.curvature.hessian import HessianOperator
from lightning_ifthpo.curvature.kinds import Curvature, curvature_operator

# Scale of one of the two vectors. Hooks that clip gradients do not change the products of short vectors.
_SCALE = 1e4
# Largest relative distance of two differences of gradients that agree. In float32 those of smooth networks are exact to
# 1e-3.
_AGREEMENT = 0.05


class AsymmetricCurvatureError(SecondDerivativeError):
    """Products with the curvature of a loss are not symmetric: its gradient is not that of a function."""


def verified_operator(
    curvature: Curvature, loss: Loss, custom: Sequence[str] = (), *, tolerance: float | None = None
) -> LossOperator:
    """Returns the curvature operator of a loss; raises SecondDerivativeError if its products cannot be trusted.

    Products must be symmetric and linear: u·A(sv)/s = v·Au for two random vectors and a scale s. This holds for every
    loss, also where its gradient jumps, as with ReLU. It fails if a hook or a backward pass of the user's own changes
    gradients, or if torch computes a second derivative wrongly. If the loss contains custom functions, a product with
    the Hessian is also compared with differences of gradients, unless these jump. Finite differences are not checked.

    Args:
        curvature: Name of the curvature, as in `curvature_operator`.
        loss: The loss, with parameters w, together [n].
        custom: Names of the custom functions in its graph, as `check_complete` returns them.
        tolerance: Largest relative asymmetry; None for 10 √eps of the dtype of the parameters.

    Raises:
        AsymmetricCurvatureError: If products are not symmetric, or not linear.
        SecondDerivativeError: If a second derivative is left out or wrong for another reason.

    Cost: two products. Custom functions cost one product and six gradients more, and a second operator.
    """
    operator = curvature_operator(curvature, loss, loss.parameters)
    if curvature == "finite_difference":
        return operator
    check_symmetric(operator, loss.name, tolerance)
    if not custom or tolerance is not None:
        return operator
    check_custom(loss, custom)
    return curvature_operator(curvature, loss, loss.parameters)  # moving the weights has spoiled the graph of the first


def check_complete(loss: Loss) -> tuple[Tensor, list[str]]:
    """Returns the gradient of a loss, [n], and the names of the custom functions in its graph.

    Raises:
        SecondDerivativeError: If `backward` gives another gradient than `torch.autograd.grad`, because weights are used
            inside a function that runs a backward pass of its own.

    Cost: 1.7 gradients.
    """
    value, _ = loss.evaluate()
    weights = [weight for weight in loss.parameters if weight.requires_grad]
    space = loss.over(weights).space
    found = loss.combine(space.flatten(vjp([value], weights)))
    expected = loss.combine(space.flatten(_gradients_by_backward(value, weights)))
    custom = custom_functions([value])
    if _differ(found, expected, torch.finfo(found.dtype).eps ** 0.5):  # sums in another order differ by some eps
        raise SecondDerivativeError(
            f"{loss.name} uses weights inside a function that runs a backward pass of its own, where "
            f"torch.autograd.grad does not find them{_named(custom)}",
            "use another kind of activation checkpointing",
        )
    return found, custom


def check_symmetric(operator: CurvatureOperator, name: str, tolerance: float | None = None) -> None:
    """Raises AsymmetricCurvatureError unless products are symmetric and linear."""
    generator = generator_of(Stream.VERIFICATION)
    u, v = torch.randn(2, operator.size, generator=generator, dtype=torch.float64).to(operator.device, operator.dtype)
    image_u, image_v = operator.matvec(u), operator.matvec(_SCALE * v) / _SCALE
    left, right = float(v @ image_u), float(u @ image_v)
    # u and v are random, so that both numbers have the size of the Frobenius norm of A.
    size = float(torch.linalg.vector_norm(image_u) + torch.linalg.vector_norm(image_v))
    # 10 sqrt(eps): products of networks in float32 are exact to 1e-5, and one wrong layer of many is to be seen.
    tolerance = 10.0 * torch.finfo(operator.dtype).eps ** 0.5 if tolerance is None else tolerance
    if abs(left - right) > tolerance * size:
        raise AsymmetricCurvatureError(
            f"second derivatives of {name} are not symmetric: v·Au = {left:.4g} and u·Av = {right:.4g} for two random "
            "vectors. Its gradient is not that of a function",
            "look for hooks, for custom backward passes, and for gradient reversal",
        )


def check_custom(loss: Loss, custom: Sequence[str]) -> None:
    """Raises SecondDerivativeError if a product differs from differences of gradients, and these do not jump."""
    generator = generator_of(Stream.VERIFICATION)
    v = torch.randn(loss.space.size, generator=generator, dtype=torch.float64).to(loss.space.device, loss.space.dtype)
    operator = HessianOperator(loss, loss.parameters)
    product, gradient = operator.matvec(v), operator.gradient
    coarse, fine = (_difference(loss, v, gradient, shortening) for shortening in (1.0, 0.25))
    if not _differ(coarse, fine, _AGREEMENT) and _differ(product, fine, 2 * _AGREEMENT):
        raise SecondDerivativeError(
            f"second derivatives of {loss.name} differ from differences of its gradients{_named(custom)}",
            "give these functions a backward pass made of torch operations, or use curvature='finite_difference'",
        )


def _gradients_by_backward(value: Tensor, weights: Sequence[Tensor]) -> list[Tensor | None]:
    """Returns what `backward` adds to `.grad` of the weights; leaves `.grad` of all tensors as it was."""
    leaves = {*weights, *(node.variable for node in nodes([value]) if hasattr(node, "variable"))}
    before = {leaf: leaf.grad for leaf in leaves}
    try:
        for leaf in leaves:
            leaf.grad = None
        value.backward(retain_graph=True)  # type: ignore[no-untyped-call]
        return [weight.grad for weight in weights]
    finally:
        for leaf, grad in before.items():
            leaf.grad = grad


def _difference(loss: Loss, v: Tensor, gradient: Tensor, shortening: float) -> Tensor:
    """Returns Hv by differences of gradients."""
    space = loss.space
    step = shortening * relative_step(space.dtype) * natural_step(v, space.values, gradient, float(loss.value()))
    with loss.along(space.split(step * v)) as at:
        ahead, behind = (space.flatten(vjp([at(sign)], space.tensors)) for sign in (1.0, -1.0))
    difference: Tensor = loss.combine(ahead - behind) / (2.0 * step)
    return difference


def _differ(left: Tensor, right: Tensor, tolerance: float) -> bool:
    """Returns whether vectors differ by more than a relative tolerance; a NaN, as after overflow, says nothing."""
    return bool(torch.linalg.vector_norm(left - right) > tolerance * torch.linalg.vector_norm(right))


def _named(functions: Sequence[str]) -> str:
    return f" ({', '.join(functions)})" if functions else ""
