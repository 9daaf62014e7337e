"""Curvature from gradients alone, for losses without a second derivative."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from lightning_ifthpo.core.autodiff import vjp, zeros_for_none
from lightning_ifthpo.core.graph import leaves
from lightning_ifthpo.core.loss import Loss, LossFunction, as_loss
from lightning_ifthpo.core.step_length import natural_step, relative_step, step_along
from lightning_ifthpo.core.vectors import length
from lightning_ifthpo.curvature.base import LossOperator

# Step lengths to try at the first product, over cbrt(eps) times the weights. The last ones are for tensors in units a
# thousand and a million times as small as those of the largest tensor.
_FACTORS = (1.0, 0.1, 1e-3, 1e-6)
# Asymmetry of the gradients around w that says that the product is noise. The asymmetry of smooth networks was .001 to
# .15, that of ReLU networks in float32, where a step crosses kinks, .5 to 1; errors were 50 % to 4,000 % then.
_NOISE = 0.5
_UNRELIABLE = (
    "finite differences in {dtype} are not reliable here: the gradients ahead and behind are not symmetric "
    "(asymmetry {asymmetry:.2g}, expected less than 0.1), because a step crosses kinks, as of ReLU, or drowns in "
    "rounding. Use float64, or another curvature"
)


class FiniteDifferenceOperator(LossOperator):
    """Hv ≈ [∇L(w + εv) − ∇L(w − εv)] / 2ε, with w moved in place and restored from a copy.

    It serves kernels without a second derivative (fused attention), compiled graphs and sharded parameters. Every
    product evaluates the loss again with the same random numbers, so that dropout draws the same mask. The step length
    ε‖v‖ is cbrt(machine epsilon) · ‖w‖, over the weights that the loss uses; see `natural_step`. The first product
    shortens it, for all products, if the gradients ahead and behind are not symmetric around that at w, as Gill,
    Murray, Saunders and Wright (1983) choose intervals. Expect a relative error of 1e-4 in float32 and 1e-9 in float64.
    Where no step length works, as for ReLU networks in float32, a product warns, once.

    Weights without a gradient, such as frozen ones or the padding of an embedding, do not move.

    Cost: two gradients for a product, and one extra copy of the parameters; for the first product one gradient more,
    two more for each change of the step length, at most nine, and two more if there are weights without a gradient. A
    mixed product costs as much as a product; that of a verified loss, before any product, two gradients in the
    hyperparameters alone. It then takes `Loss.difference_factor` for its step, and shows no noise.

    Args:
        loss: Callable without arguments that returns the scalar loss, or (loss, outputs); or a `Loss`.
        parameters: The tensors w, together [n].

    >>> w = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    >>> operator = FiniteDifferenceOperator(lambda: (w[0] * w[1]) ** 2, [w])
    >>> operator.to_dense().round(decimals=6)
    tensor([[8., 8.],
            [8., 2.]], dtype=torch.float64)
    """

    def __init__(self, loss: LossFunction | Loss, parameters: Sequence[Tensor]) -> None:
        super().__init__(as_loss(loss, parameters))
        self._loss.fix_random_numbers()
        self._factor: float | None = None  # of the step length, once it is known
        self._largest = 0.0  # change of the gradient over the distance that the weights moved, so far
        self._has_warned = False
        self._value: Tensor | None = None  # L between both sides
        self._unseen: Tensor | None = None  # weights without a gradient, [n]; None before there are any

    def slope_and_curvature(self, v: Tensor, *, step: float = 0.0) -> tuple[Tensor, Tensor]:
        """Returns ∇L·v and vᵀHv, scalars, for v: [n].

        With a step the gradients are taken at w ± step · v, if their difference is larger than rounding. They then see
        kinks at the scale of a step. Cost: three gradients, more if no step is given or the difference drowns.
        """
        space = self._loss.space
        ahead, behind, inverse_width = self._gradients(v, space.tensors, step)
        curvature = self._loss.combine((space.flatten(ahead) - space.flatten(behind)) @ v) * inverse_width
        return self._loss.combine(self._own_gradient() @ v), curvature

    @cached_property
    def _at_weights(self) -> tuple[Tensor, Tensor]:
        """This process's loss and gradient at w; one gradient, which all products share."""
        loss = self._loss.evaluate()[0]
        return loss.detach(), self._loss.space.flatten(vjp([loss], self._loss.parameters))

    def _own_loss(self) -> Tensor:
        """L at w; the mean on both sides, which is as close as a derivative by differences, if that is known."""
        return self._at_weights[0] if self._value is None or "_at_weights" in vars(self) else self._value

    def _own_gradient(self) -> Tensor:
        return self._at_weights[1]

    def _own_product(self, v: Tensor) -> Tensor:
        space = self._loss.space
        return space.flatten(_quotients(space.tensors, *self._gradients(v, space.tensors)))

    def _own_mixed_product(
        self, v: Tensor, hyperparameters: Sequence[Tensor], parts: Sequence[tuple[float, Tensor]]
    ) -> list[Tensor | None]:
        alone = self._loss.is_verified and self._factor is None
        gradients = self._slopes if alone else self._gradients
        return _quotients(hyperparameters, *gradients(v, hyperparameters))

    def _slopes(self, v: Tensor, inputs: Sequence[Tensor]) -> tuple[_Gradients, _Gradients, float]:
        """Returns what `_gradients` does, without a gradient in the weights that could show a better step length."""
        weights = self._loss.parameters
        direction = [part if bool(part.any()) else None for part in self._loss.space.split(v)]
        if all(part is None for part in direction):
            return [None] * len(inputs), [None] * len(inputs), 0.0
        unit = self._loss.difference_factor * relative_step(self.dtype) * step_along(direction, weights)
        with self._loss.along(direction) as at:
            gradients, values = [], []
            for sign in (1.0, -1.0):
                values.append(at(sign * unit))
                gradients.append(vjp([values[-1]], inputs))
        used = set(map(id, leaves(values)))
        moved = [part is not None for part in direction]
        known = [moves and id(weight) in used for moves, weight in zip(moved, weights, strict=True)]
        if moved != known:  # weights that the loss detaches do not move
            kept = [part if known else None for part, known in zip(direction, known, strict=True)]
            return self._slopes(self._loss.space.flatten(kept), inputs)
        self._value = (values[0].detach() + values[1].detach()) / 2.0
        return gradients[0], gradients[1], 1.0 / (2.0 * unit)

    @property
    def factor(self) -> float:
        """Of the step length, as the products so far have chosen it."""
        return self._factor or 1.0

    def _gradients(
        self, v: Tensor, inputs: Sequence[Tensor], step: float | None = None
    ) -> tuple[_Gradients, _Gradients, float]:
        """Returns ∂L/∂inputs at w + εv and at w − εv, and 1 / 2ε. A look has a step, which may be zero."""
        v = v if self._unseen is None else v.masked_fill(self._unseen, 0.0)
        if not bool(v.any()):
            return [None] * len(inputs), [None] * len(inputs), 0.0
        space, (loss, gradient) = self._loss.space, self._at_weights
        natural = natural_step(v, space.values, gradient, float(loss))
        unit = relative_step(self.dtype) * natural
        with self._loss.along(space.split(v * unit)) as at:

            def pair(factor: float) -> _Pair:
                ahead, behind = (vjp([at(sign * factor)], [*space.tensors, *inputs]) for sign in (1.0, -1.0))
                return _Pair(factor, ahead, behind, *self._norms(ahead, behind))

            factor = (step or 0.0) / unit or self._factor
            chosen = pair(factor) if factor else None
            if chosen is None or (step and self._drowns(chosen)):
                chosen = self._calibrated(pair, 1.0 / (natural * length(v)))
        unseen = self._without_gradient(chosen) & (v != 0.0)
        if bool(unseen.any()):
            self._unseen = unseen if self._unseen is None else unseen | self._unseen
            return self._gradients(v, inputs, step)
        if step is None:
            self._warn_of_noise(chosen, unit * length(v))
        count = len(space.tensors)
        return chosen.ahead[count:], chosen.behind[count:], 1.0 / (2.0 * unit * chosen.factor)

    def _calibrated(self, pair: Callable[[float], _Pair], longest: float) -> _Pair:
        """Returns a pair of gradients at a step length that suits the loss, and keeps that length for all products."""
        eps = torch.finfo(self.dtype).eps
        best, factors, least = None, list(_FACTORS), math.inf
        while factors and least > eps ** (1 / 3):  # 6e-6 in float64, 5e-3 in float32: far from the optimum
            tried = pair(factors.pop(0))
            if self._drowns(tried):  # a shorter step is no better
                factors = [longest] if tried.factor == 1.0 < longest else []
            if tried.change <= 100.0 * eps * tried.size:
                continue  # rounding alone
            # truncation and rounding
            error = (tried.asymmetry / tried.change) ** 2 + eps * tried.size / tried.change
            if error < least:
                best, least = tried, error
        if best is None:  # the product is zero, which says nothing of the step length
            return tried
        self._factor = best.factor
        return best

    def _warn_of_noise(self, pair: _Pair, length: float) -> None:
        """Warns once of gradients that are not symmetric around w, compared with the largest change so far."""
        change, asymmetry = (number / (length * pair.factor) for number in (pair.change, pair.asymmetry))
        self._largest = max(self._largest, change)
        if asymmetry > _NOISE * self._largest and not self._has_warned:
            self._has_warned = True
            relative = asymmetry / self._largest
            warnings.warn(_UNRELIABLE.format(dtype=self.dtype, asymmetry=relative), stacklevel=2)

    def _without_gradient(self, pair: _Pair) -> Tensor:
        """Returns which weights have no gradient at w and on either side, [n].

        Moving them may change the loss all the same, as with frozen weights, or the row of `padding_idx` of an
        embedding. Their rows of H are zero, and so are their columns.
        """
        space, zero = self._loss.space, self._at_weights[1] == 0.0
        for gradients in (pair.ahead, pair.behind):
            zero &= space.flatten(gradients[: len(space.tensors)]) == 0.0
        return zero

    def _drowns(self, pair: _Pair) -> bool:
        """Returns whether rounding takes half of the digits of a difference, or more."""
        return bool(pair.change <= torch.finfo(self.dtype).eps ** 0.5 * pair.size)

    def _norms(self, ahead: _Gradients, behind: _Gradients) -> list[float]:
        """Returns norms: half the change of the gradient over the step, its asymmetry, its size.

        They are those of this process, without a collective, because processes may take other branches.
        """
        space = self._loss.space
        here = self._at_weights[1]
        one, other = (space.flatten(gradients[: len(space.tensors)]) for gradients in (ahead, behind))
        vectors = [(one - other) / 2, (one - here + other - here) / 2, here.abs() + one.abs()]
        norms: list[float] = torch.stack([torch.linalg.vector_norm(vector) for vector in vectors]).tolist()
        return norms


_Gradients: TypeAlias = list[Tensor | None]


def _quotients(
    like: Sequence[Tensor], ahead: _Gradients, behind: _Gradients, inverse_width: float
) -> list[Tensor | None]:
    """Returns (ahead − behind) · inverse_width, with `None` where both are."""
    known = [a is not None or b is not None for a, b in zip(ahead, behind, strict=True)]
    pairs = zip(zeros_for_none(ahead, like), zeros_for_none(behind, like), strict=True)
    return [(a - b) * inverse_width if any_known else None for any_known, (a, b) in zip(known, pairs, strict=True)]


class _Pair(NamedTuple):
    """Gradients on either side of the weights, the factor of the step length, and norms of the gradients.

    The norms are half the change of the gradient over the step, its asymmetry around the weights, and its size.
    """

    factor: float
    ahead: _Gradients
    behind: _Gradients
    change: float
    asymmetry: float
    size: float
