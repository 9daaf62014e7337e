"""Learned decay of weights towards zero or towards pretrained weights: one for all, one per tensor or per weight."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from itertools import cycle
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from lightning_ifthpo.core.validation import require_choice
from lightning_ifthpo.hyperparameters.bounded import Bounded, require_inside

Granularity: TypeAlias = Literal["global", "tensor", "weight"]


class _Decay(Bounded):
    """Base class of penalties ½ Σ d_i (w_i − c_i)² with learned decay d towards a center c."""

    is_for_training_loss = True

    def __init__(
        self,
        module: nn.Module,
        granularity: Granularity = "global",
        *,
        initial: float | Mapping[str, float] = 1e-4,
        maximum: float = 1.0,
    ) -> None:
        if not isinstance(module, nn.Module):
            raise TypeError(f"expected a module with weights to decay, got {module!r}")
        require_choice("granularity", granularity, get_args(Granularity))
        decayed = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
        if not decayed:
            raise ValueError(f"{type(module).__name__} has no parameters that require a gradient")
        if isinstance(initial, Mapping) and granularity == "global":
            raise ValueError("granularity='global' has one decay: pass a number as initial, or granularity='tensor'")
        names = [""] if granularity == "global" else list(decayed)
        if not isinstance(initial, Mapping):
            initials = dict.fromkeys(names, initial)
        elif initial.keys() == set(names):
            initials = {name: float(value) for name, value in initial.items()}
        else:
            raise ValueError(f"expected initial decays of {', '.join(names)}, got {', '.join(initial)}")
        for value in initials.values():
            require_inside(value, maximum)
        super().__init__(initials[names[0]], maximum)
        self.names, self.weights = tuple(decayed), tuple(decayed.values())
        self.granularity = granularity
        device, dtype = self.weights[0].device, self.weights[0].dtype
        starts = [-math.log(1.0 / initials[name] - 1.0 / maximum) for name in names]
        shapes = [weight.shape if granularity == "weight" else () for weight in self.weights]
        self.log_decay = nn.ParameterList(
            nn.Parameter(torch.full(shape, start, device=device, dtype=dtype), requires_grad=False)
            for shape, start in zip(shapes, starts, strict=False)
        )

    def natural_values(self) -> Tensor | dict[str, Tensor]:
        """Returns the decay, in loss / parameter²: a scalar, or for each weight tensor by its name.

        The decay of a tensor is a scalar, or has the tensor's shape.
        """
        decays = self._decays()
        return decays[0] if self.granularity == "global" else dict(zip(self.names, decays, strict=True))

    def forward(self) -> Tensor:
        """Returns ½ Σ d_i (w_i − c_i)², a scalar."""
        pairs = zip(cycle(self._decays()), self._displacements(), strict=False)  # a single decay serves all weights
        return torch.stack([(d * w.square()).sum() for d, w in pairs]).sum() / 2

    def _displacements(self) -> Iterable[Tensor]:
        """Returns w − c for each weight tensor."""
        raise NotImplementedError

    def _decays(self) -> list[Tensor]:
        return [self._value(log_decay - math.log(self.maximum)) for log_decay in self.log_decay]

    def check_training(self, parameters: Iterable[Tensor], lr: float | Tensor) -> None:
        """Raises ValueError if a decayed weight is none of the module's `parameters`, or if lr · maximum >= 2."""
        lr, kind = float(lr), type(self).__name__
        if not set(map(id, self.weights)) <= set(map(id, parameters)):
            raise ValueError(
                f"{kind} decays tensors that are no longer parameters of the module; create it again after "
                "weights were replaced (load_state_dict(assign=True), pruning, parametrizations)"
            )
        if lr * self.maximum >= 2.0:
            raise ValueError(
                f"{kind} may reach {self.maximum:g}, and with the learning rate {lr:g} a decay of 2/lr = "
                f"{2.0 / lr:g} makes training diverge. If such a learning rate is not meant, lower it; else pass "
                f"maximum={1.0 / lr:g}"
            )


class WeightDecay(_Decay):
    """An L2 penalty ½ Σ d_i w_i² with learned decay d.

    The decay is d = 1 / (e^{−λ} + 1/maximum): close to e^λ while small, and always below `maximum`.

    Args:
        module: Its parameters that require a gradient are decayed. They do not become parameters of this module.
        granularity: "global" for one decay for all weights, "tensor" for one per tensor, "weight" for one per weight.
        initial: Decay at the start, in (0, maximum); in loss / parameter². Or one for each weight tensor by its name,
            such as `hyperparameter_values()["decay"]` of an earlier run with one decay per tensor.
        maximum: Upper bound of each decay, in loss / parameter². From 2/lr on, gradient descent diverges.

    Raises:
        ValueError: If an argument is out of range, no parameter requires a gradient, or names do not fit.
        TypeError: If `module` is not a module.

    >>> net = nn.Linear(2, 1, bias=False)
    >>> decay = WeightDecay(net, granularity="weight", initial=0.5)
    >>> decay.natural_values()
    {'weight': tensor([[0.5000, 0.5000]])}
    >>> torch.allclose(decay(), 0.25 * net.weight.square().sum())
    True
    """

    def _displacements(self) -> Iterable[Tensor]:
        return self.weights


class Anchor(_Decay):
    """A penalty ½ Σ d_i (w_i − w⁰_i)² with learned decay d towards the weights w⁰ at its creation, for fine-tuning.

    This is L2-SP (Li, Grandvalet, Davoine 2018) with learned strengths: one per tensor says which layers should stay
    close to the pretrained ones. Create it after pretrained weights are loaded, for the pretrained layers alone; a new
    head has nothing to return to, and may have a `WeightDecay`. Keeps one copy of the weights, as buffers.

    Args:
        module: Its parameters that require a gradient are anchored. They do not become parameters of this module.
        granularity: "global" for one decay for all weights, "tensor" for one per tensor, "weight" for one per weight.
        initial: Decay at the start, in (0, maximum); in loss / parameter². Or one for each weight tensor by its name.
        maximum: Upper bound of each decay, in loss / parameter². From 2/lr on, gradient descent diverges.

    Raises:
        ValueError: If an argument is out of range, no parameter requires a gradient, or names do not fit.
        TypeError: If `module` is not a module.

    >>> net = nn.Linear(2, 1, bias=False)
    >>> anchor = Anchor(net, initial=0.5)
    >>> anchor().item()
    0.0
    >>> with torch.no_grad():
    ...     _ = net.weight.add_(2.0)
    >>> anchor().item()  # ½ · 0.5 · (2² + 2²)
    2.0
    """

    def __init__(
        self,
        module: nn.Module,
        granularity: Granularity = "global",
        *,
        initial: float | Mapping[str, float] = 1e-2,
        maximum: float = 1.0,
    ) -> None:
        super().__init__(module, granularity, initial=initial, maximum=maximum)
        for place, weight in enumerate(self.weights):
            self.register_buffer(f"pretrained_{place}", weight.detach().clone())

    def _displacements(self) -> Iterable[Tensor]:
        return (weight - start for weight, start in zip(self.weights, self.buffers(), strict=True))
