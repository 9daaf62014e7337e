"""The generalized Gauss–Newton matrix: the Hessian without the curvature of the model itself."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, reduce

import torch
from torch import Tensor

from lightning_ifthpo.core.autodiff import add, tangent, tangents, vjp, zeros_for_none
from lightning_ifthpo.core.graph import check_differentiable, reaches
from lightning_ifthpo.core.loss import Loss, LossFunction, as_loss
from lightning_ifthpo.core.random_state import Stream, generator_of
from lightning_ifthpo.curvature.base import LossOperator
from lightning_ifthpo.curvature.outputs import checked_outputs, cut_at


class GaussNewtonOperator(LossOperator):
    """G = [Jᵀ I] ∇²L [Jᵀ I]ᵀ for a loss L(z, w) of the model's outputs z and J = ∂z/∂w (Schraudolph 2002).

    For a loss of the outputs alone this is Jᵀ L_zz J. A term that depends on the parameters directly (a penalty) enters
    with its exact Hessian and its cross terms with the outputs. G is positive semi-definite where L is convex in (z, w)
    together, as for cross-entropy or squared error plus a convex penalty. G equals the Hessian where the model is
    linear or the residuals vanish.

    Cost: one forward pass and one differentiable gradient; of a verified loss when they are needed. A product costs
    1.3 gradients with linear layers, and 2 to 4.6 with convolutions, because torch's second derivative of a convolution
    also computes terms that are not needed. With `Loss.forward_mode` it costs 1.5 to 2 with convolutions, and no
    differentiable gradient. A mixed product costs .6 gradients, and next to nothing for a sum of the vectors of the
    last two products. If the outputs depend on hyperparameters, it costs one to three.

    Args:
        loss: Callable without arguments that returns (loss, outputs) with outputs one tensor or several, or the loss
            alone if it calls `mark_outputs`; or a `Loss`.
        parameters: The tensors w, together [n].

    Raises:
        TypeError, ValueError: If the loss is not a scalar tensor with a graph, or no outputs are known.

    >>> import torch
    >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> def loss():
    ...     z = w**2
    ...     return (z**2).sum() / 2, z
    >>> GaussNewtonOperator(loss, [w]).to_dense()  # J = diag(2w), L_zz = I
    tensor([[ 4.,  0.],
            [ 0., 16.]])
    """

    def __init__(self, loss: LossFunction | Loss, parameters: Sequence[Tensor]) -> None:
        super().__init__(as_loss(loss, parameters))
        self._images: list[tuple[Tensor, int, list[Tensor]]] = []  # v, its version and Jv, of the last two products
        if not self._loss.is_verified:
            gradients = [*self._output_gradient, *self._differentiable_gradient]
            check_differentiable(gradients, self._total, self._loss.name)

    @cached_property
    def _evaluated(self) -> tuple[Tensor, Sequence[Tensor]]:
        """L and z, with their graph."""
        total, outputs = self._loss.evaluate()
        return total, checked_outputs(outputs)

    @property
    def _total(self) -> Tensor:
        return self._evaluated[0]

    @property
    def _outputs(self) -> Sequence[Tensor]:
        return self._evaluated[1]

    @cached_property
    def _output_gradient(self) -> list[Tensor | None]:
        """∂L/∂z, with its graph."""
        return vjp([self._total], self._outputs, create_graph=True)

    @cached_property
    def _penalty_gradient(self) -> list[Tensor | None]:
        """∂L/∂w at fixed z, with its graph."""
        with cut_at(self._outputs):
            return vjp([self._total], self._loss.parameters, create_graph=True)

    @cached_property
    def _output_slopes(self) -> list[Tensor]:
        """The entries of u = ∂L/∂z, as variables.

        Views make the entries of u separate ones: one tensor may be the gradient of two outputs (of z₁ + z₂), or one
        gradient may be computed from the other (of z₁ − z₂).
        """
        slopes = zeros_for_none(self._output_gradient, self._outputs)
        return [u.view_as(u) if u.requires_grad else u.detach().requires_grad_() for u in slopes]

    @cached_property
    def _transposed_product(self) -> list[Tensor | None]:
        """Jᵀu, which is linear in u, so that its own vjp with respect to u is Jv for any u.

        With u = ∂L/∂z it is also the gradient of the loss. About .7 gradients.
        """
        return vjp(self._outputs, self._loss.parameters, self._output_slopes, create_graph=True)

    @property
    def _differentiable_gradient(self) -> list[Tensor | None]:
        return add(self._transposed_product, self._penalty_gradient)

    @property
    def uses_forward_mode(self) -> bool:
        """Whether derivatives along a direction are taken in forward mode; see `Loss`."""
        return self._loss.forward_mode

    def _own_loss(self) -> Tensor:
        return self._total

    def _own_gradient(self) -> Tensor:
        return self._loss.space.flatten(self._differentiable_gradient)

    def _own_product(self, v: Tensor) -> Tensor:
        jv = self._output_change(v)
        outputs, space = self._outputs, self._loss.space
        with cut_at(outputs):
            gradients = [*self._output_gradient, *self._penalty_gradient]
            curved = vjp(gradients, [*outputs, *space.tensors], [*jv, *space.split(v)])
        through_outputs, direct = curved[: len(outputs)], curved[len(outputs) :]
        used = [None if u is None else z for z, u in zip(outputs, through_outputs, strict=True)]
        return space.flatten(add(vjp(used, space.tensors, through_outputs), direct))

    def _own_mixed_product(
        self, v: Tensor, hyperparameters: Sequence[Tensor], parts: Sequence[tuple[float, Tensor]]
    ) -> list[Tensor | None]:
        vs = self._loss.space.split(v)
        if self._loss.forward_mode and "_evaluated" not in vars(self):
            self._output_change(v)  # evaluates the loss, too
        if reaches(self._outputs, hyperparameters):
            return vjp(self._differentiable_gradient, hyperparameters, vs)
        # z does not depend on λ, so that the derivative is that of ∂L/∂z · Jv, without the model
        jv = self._known_change(parts or [(1.0, v)]) or self._output_change(v)
        return vjp([*self._output_gradient, *self._penalty_gradient], hyperparameters, [*jv, *vs])

    def _output_change(self, v: Tensor) -> list[Tensor]:
        """Returns Jv, shaped like the outputs."""
        jv = self._forward_change(v) if self._loss.forward_mode else self._reverse_change(v)
        self._images = [*self._images[-1:], (v, v._version, jv)]
        return jv

    def _reverse_change(self, v: Tensor) -> list[Tensor]:
        return zeros_for_none(
            vjp(self._transposed_product, self._output_slopes, self._loss.space.split(v)), self._output_slopes
        )

    def _forward_change(self, v: Tensor) -> list[Tensor]:
        with tangents(self._loss.parameters, self._loss.space.split(v)):
            if "_evaluated" not in vars(self):
                return [tangent(output).detach() for output in self._outputs]
            with torch.no_grad():
                _, outputs = self._loss.evaluate(graph=False)
                return [tangent(output) for output in outputs]

    def has_adjoint(self) -> bool:
        """Returns whether u·Jv = v·Jᵀu, for the v of the last product and a random u. About .7 gradients."""
        v, _, jv = self._images[-1]
        generator = generator_of(Stream.VERIFICATION)
        us = [torch.randn(z.shape, generator=generator).to(z) for z in self._outputs]
        image = self._loss.space.flatten(vjp(self._outputs, self._loss.parameters, us))
        products = [(u * z).sum() for u, z in zip(us, jv, strict=True)]
        size = sum(float(u.norm() * z.norm()) for u, z in zip(us, jv, strict=True))
        # 10 √eps: products of networks in float32 are exact to 1e-5
        difference = abs(float(sum(products) - v @ image))
        return bool(difference <= 10.0 * torch.finfo(self.dtype).eps ** 0.5 * size)

    def _known_change(self, parts: Sequence[tuple[float, Tensor]]) -> list[Tensor] | None:
        """Returns Jv for a sum v of numbers times vectors, if all their images are kept."""
        known = {id(v): jv for v, version, jv in self._images if v._version == version}
        if not all(id(v) in known for _, v in parts):
            return None
        scaled = [[share * z for z in known[id(v)]] for share, v in parts]
        return [reduce(torch.add, images) for images in zip(*scaled, strict=True)]


def forward_slope_and_curvature(loss: Loss, v: Tensor) -> tuple[Tensor, Tensor]:
    """Returns ∇L·v and vᵀGv for v: [n] of this process's share, scalars, by one forward pass in forward mode.

    Raises:
        RuntimeError: If an operation of the loss has no derivative in forward mode.
        TypeError, ValueError: As `GaussNewtonOperator`.
    """
    space = loss.space
    with tangents(space.tensors, space.split(v)):
        total, outputs = loss.evaluate()
        inputs = [*checked_outputs(outputs), *space.tensors]
        with cut_at(inputs[: -len(space.tensors)]):
            gradients = vjp([total], inputs)  # their tangents are ∇²L [Jv v]
        pairs = [(gradient, tensor) for gradient, tensor in zip(gradients, inputs, strict=True) if gradient is not None]
        curvature = sum(((tangent(left) * tangent(right)).sum() for left, right in pairs), start=v.new_zeros(()))
        return tangent(total).reshape(()), curvature
