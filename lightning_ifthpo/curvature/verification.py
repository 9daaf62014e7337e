"""Checks, on one batch, that the derivatives of a loss are those of the gradient that training follows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_ifthpo.core.autodiff import vjp
from lightning_ifthpo.core.consistency import follows_its_gradient
from lightning_ifthpo.core.functions import twice_differentiable_functions
from lightning_ifthpo.core.graph import SecondDerivativeError, custom_functions, has_convolutions, is_smooth, leaves
from lightning_ifthpo.core.loss import Loss
from lightning_ifthpo.core.random_state import Stream, generator_of
from lightning_ifthpo.core.space import ParameterSpace
from lightning_ifthpo.core.step_length import natural_step, relative_step
from lightning_ifthpo.curvature.base import CurvatureOperator, LossOperator
from lightning_ifthpo.curvature.gauss_newton import GaussNewtonOperator
from lightning_ifthpo.curvature.hessian import HessianOperator
from lightning_ifthpo.curvature.kinds import Curvature, curvature_operator

# Scale of one of the two vectors. Hooks that clip gradients do not change the products of short vectors.
_SCALE = 1e4
# Largest relative distance of two differences of gradients that agree. In float32 those of smooth networks are exact to
# 1e-3.
_AGREEMENT = 0.01


class AsymmetricCurvatureError(SecondDerivativeError):
    """Products with the curvature of a loss are not symmetric: its gradient is not that of a function."""


@dataclass(frozen=True)
class Structure:
    """What one evaluation of a loss shows.

    Attributes:
        value: L on the global batch, detached.
        gradient: ∂L/∂w, [n].
        marks_outputs: Whether the loss returned or marked outputs.
        custom: Names of the custom functions in the graph.
        is_smooth: Whether the gradient has no jumps, as with ReLU.
        convolves: Whether there is a convolution in the graph.
        slopes: This process's part of ∂L/∂t for each leaf tensor t in the graph, also for hyperparameters.
    """

    value: Tensor
    gradient: Tensor
    marks_outputs: bool = False
    custom: Sequence[str] = ()
    is_smooth: bool = False
    convolves: bool = False
    slopes: Mapping[Tensor, Tensor | None] = field(default_factory=dict)


def check_complete(loss: Loss) -> Structure:
    """Returns the structure of a loss.

    Raises:
        SecondDerivativeError: If `backward` gives another gradient than `torch.autograd.grad`, because weights are used
            inside a function that runs a backward pass of its own.

    Cost: 1.7 gradients.
    """
    value, outputs = loss.evaluate()
    found = loss.combine(loss.space.flatten(vjp([value], loss.parameters)))
    slopes = _gradients_by_backward(value, loss.parameters)
    expected = loss.combine(loss.space.flatten(slopes[weight] for weight in loss.parameters))
    functions, smooth = custom_functions([value]), is_smooth([value])
    convolves = has_convolutions([value])
    structure = Structure(loss.combine(value), found, bool(outputs), functions, smooth, convolves, slopes)
    if _differ(found, expected, torch.finfo(found.dtype).eps ** 0.5):  # sums in another order differ by some eps
        raise SecondDerivativeError(
            f"{loss.name} uses weights inside a function that runs a backward pass of its own, where "
            f"torch.autograd.grad does not find them{_named(structure.custom)}",
            "use another kind of activation checkpointing",
        )
    return structure


def verified_operator(
    curvature: Curvature, loss: Loss, structure: Structure, *, tolerance: float | None = None
) -> tuple[LossOperator, bool]:
    """Returns the curvature operator of a loss, and whether the loss follows its gradient (`follows_its_gradient`).

    A product with the Hessian must equal a difference of gradients, if the loss is smooth, or in float64, where steps
    are so short that they cross few kinks. Otherwise products must be symmetric and linear: u·A(sv)/s = v·Au for two
    random vectors and a scale s. This holds for every loss, also where its gradient jumps, as with ReLU. It fails if a
    hook or a backward pass of the user's own changes gradients, or if torch computes a second derivative wrongly.
    Products of losses with custom functions are also compared with differences, unless these jump. Finite differences
    themselves are not checked.

    With convolutions Gauss–Newton is tried in forward mode first, which is cheaper. It may lack a derivative, it goes
    on inside `torch.no_grad`, and activation checkpoints may not know it: then products fail, or Jv is not the adjoint
    of Jᵀu.

    Args:
        curvature: Name of the curvature, as in `curvature_operator`.
        loss: The loss, with parameters w, together [n].
        structure: The result of `check_complete`.
        tolerance: Largest relative asymmetry in low precision, where nothing else can be checked; None in float32.

    Raises:
        AsymmetricCurvatureError: If products are not symmetric, or not linear.
        SecondDerivativeError: If a second derivative is left out or wrong for another reason.

    Cost: a forward pass; and one product and one gradient for the Hessian of a smooth loss, else two products.
    What differs, and custom functions, cost up to one operator, two products and seven gradients more.
    """
    precise = structure.is_smooth or loss.space.dtype is torch.float64
    comparable = curvature == "hessian" and precise and tolerance is None
    # before there is an operator, whose graph does not survive that weights move
    follows = tolerance is not None or follows_its_gradient(loss, structure.gradient, structure.value)
    if curvature == "finite_difference":
        return curvature_operator(curvature, loss, loss.parameters), follows
    forward = curvature == "gauss_newton" and structure.convolves and not structure.custom and tolerance is None
    if forward and (operator := _in_forward_mode(loss)) is not None:
        return operator, follows
    if comparable:
        v = _probe(loss.space, structure.gradient)
        difference = _one_sided_difference(loss, v, structure)
    operator = curvature_operator(curvature, loss, loss.parameters)
    if comparable and not _differ(operator.matvec(v), difference, 2 * _AGREEMENT):
        return operator, follows
    check_symmetric(operator, loss.name, tolerance)
    if tolerance is not None or not (comparable or structure.custom):
        return operator, follows
    if _differs_from_differences(loss, structure):
        if structure.custom:
            raise SecondDerivativeError(
                f"second derivatives of {loss.name} differ from differences of its gradients{_named(structure.custom)}",
                "give these functions a backward pass made of torch operations, or use curvature='finite_difference'",
            )
        follows = False
    return curvature_operator(curvature, loss, loss.parameters), follows


def _in_forward_mode(loss: Loss) -> LossOperator | None:
    """Returns Gauss–Newton in forward mode, if its products are symmetric and linear, and its derivatives agree."""
    operator = GaussNewtonOperator(loss.in_forward_mode(), loss.parameters)
    try:
        check_symmetric(operator, loss.name)
        faults = loss.combine(torch.tensor(float(not operator.has_adjoint()), device=operator.device))
    except (RuntimeError, TypeError, AttributeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        return None
    return None if float(faults) else operator  # the same in all processes


def check_symmetric(operator: CurvatureOperator, name: str, tolerance: float | None = None) -> None:
    """Raises AsymmetricCurvatureError unless products are symmetric and linear."""
    u, v = _probes(operator)
    scale = _SCALE if tolerance is None else 1.0  # in half precision a long vector would overflow
    image_u, image_v = operator.matvec(u), operator.matvec(scale * v) / scale
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


def _differs_from_differences(loss: Loss, structure: Structure) -> bool:
    """Returns whether a product with the Hessian differs from differences of gradients that agree with each other."""
    v = _probe(loss.space, structure.gradient)
    product = HessianOperator(loss, loss.parameters).matvec(v)
    coarse, fine = (_difference(loss, v, structure, shortening) for shortening in (1.0, 0.25))
    return not _differ(coarse, fine, _AGREEMENT) and _differ(product, fine, 2 * _AGREEMENT)


def _probe(space: ParameterSpace, gradient: Tensor) -> Tensor:
    """Returns a random vector, [n], that leaves weights alone without a gradient, as finite differences do."""
    return _probes(space)[0].masked_fill(gradient == 0.0, 0.0)


def _probes(space: ParameterSpace | CurvatureOperator) -> Tensor:
    """Returns two normal vectors, [2, n], always the same."""
    precise = torch.float64 if space.dtype is torch.float64 else torch.float32
    numbers = torch.randn(2, space.size, generator=generator_of(Stream.VERIFICATION), dtype=precise)
    return numbers.to(space.device, space.dtype)


def _gradients_by_backward(value: Tensor, weights: Sequence[Tensor]) -> dict[Tensor, Tensor | None]:
    """Returns what `backward` adds to `.grad` of weights, which the graph may not show, and of all leaves that it does.

    Leaves `.grad` of all tensors as it was.
    """
    before = {leaf: leaf.grad for leaf in {*weights, *leaves([value])}}
    try:
        for leaf in before:
            leaf.grad = None
        with twice_differentiable_functions():  # as in the forward pass, which checkpoints repeat
            value.backward(retain_graph=True)  # type: ignore[no-untyped-call]
        return {leaf: leaf.grad for leaf in before}
    finally:
        for leaf, grad in before.items():
            leaf.grad = grad


def _one_sided_difference(loss: Loss, v: Tensor, structure: Structure) -> Tensor:
    """Returns Hv by a difference of two gradients, of which one is known; exact to some √eps for a smooth loss."""
    space = loss.space
    step = torch.finfo(space.dtype).eps ** 0.5 * _natural_step(loss, v, structure)
    with loss.along(space.split(step * v)) as at:
        ahead = space.flatten(vjp([at(1.0)], space.tensors))
    difference: Tensor = (loss.combine(ahead) - structure.gradient) / step
    return difference


def _natural_step(loss: Loss, v: Tensor, structure: Structure) -> float:
    if not bool(v.any()):
        return 1.0
    return natural_step(v, loss.space.values, structure.gradient, float(structure.value))


def _difference(loss: Loss, v: Tensor, structure: Structure, shortening: float) -> Tensor:
    """Returns Hv by a difference of gradients on both sides."""
    space = loss.space
    step = shortening * relative_step(space.dtype) * _natural_step(loss, v, structure)
    with loss.along(space.split(step * v)) as at:
        ahead, behind = (space.flatten(vjp([at(sign)], space.tensors)) for sign in (1.0, -1.0))
    difference: Tensor = loss.combine(ahead - behind) / (2.0 * step)
    return difference


def _differ(left: Tensor, right: Tensor, tolerance: float) -> bool:
    """Returns whether vectors differ by more than a relative tolerance; a NaN, as after overflow, says nothing."""
    return bool(torch.linalg.vector_norm(left - right) > tolerance * torch.linalg.vector_norm(right))


def _named(functions: Sequence[str]) -> str:
    return f" ({', '.join(functions)})" if functions else ""
