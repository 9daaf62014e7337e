"""Weight decay, down to one for each weight."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_ifthpo.core.validation import is_ascending, require_choice

_GRANULARITIES = ("global", "tensor", "weight")


class WeightDecay(nn.Module):
    """An L2 penalty ½ Σ d_i w_i² with learned decay: one number, one for each tensor, or one for each weight.

    The decay is d = 1 / (e^{−λ} + 1/maximum): close to e^λ while small, and never above `maximum`. An unbounded one can
    outgrow the stability limit 2/lr of gradient descent, and training turns to NaN.

    Args:
        module: Its parameters that require a gradient are decayed. They stay its own: this module does not hold them.
        granularity: "global", "tensor" or "weight".
        initial: Decay at the start, in (0, maximum); in loss / parameter².
        maximum: Upper bound of each decay; keep lr · maximum below 2.

    Shape:
        - output: scalar.

    Raises:
        ValueError: If an argument is out of range, or no parameter requires a gradient.

    >>> net = nn.Linear(2, 1, bias=False)
    >>> decay = WeightDecay(net, granularity="weight", initial=0.5)
    >>> decay.decays()[0]
    tensor([[0.5000, 0.5000]])
    >>> torch.allclose(decay(), 0.25 * net.weight.square().sum())
    True
    """

    def __init__(
        self,
        module: nn.Module,
        granularity: Literal["global", "tensor", "weight"] = "global",
        *,
        initial: float = 1e-4,
        maximum: float = 1.0,
    ) -> None:
        super().__init__()
        if not isinstance(module, nn.Module):
            raise TypeError(f"expected the module whose weights are to decay, got {module!r}")
        require_choice("granularity", granularity, _GRANULARITIES)
        if not is_ascending(0.0, initial, maximum, math.inf):
            raise ValueError(f"expected 0 < initial < maximum < inf, got initial={initial!r} and maximum={maximum!r}")
        # A tuple keeps torch from taking the weights for parameters of this module.
        self.weights = tuple(parameter for parameter in module.parameters() if parameter.requires_grad)
        if not self.weights:
            raise ValueError(f"{type(module).__name__} has no parameters that require a gradient")
        self.maximum = maximum
        self.granularity = granularity
        start = -math.log(1.0 / initial - 1.0 / maximum)
        shapes: dict[str, list[tuple[int, ...]]] = {
            "global": [()],
            "tensor": [() for _ in self.weights],
            "weight": [tuple(weight.shape) for weight in self.weights],
        }
        device, dtype = self.weights[0].device, self.weights[0].dtype
        self.log_decay = nn.ParameterList(
            nn.Parameter(torch.full(shape, start, device=device, dtype=dtype), requires_grad=False)
            for shape in shapes[granularity]
        )

    def decays(self) -> list[Tensor]:
        """Returns the decay of each weight tensor, shaped so that it broadcasts against it."""
        # as a sigmoid, whose derivative is finite whatever λ is
        decays = [self.maximum * torch.sigmoid(log_decay - math.log(self.maximum)) for log_decay in self.log_decay]
        return decays * len(self.weights) if self.granularity == "global" else decays

    def forward(self) -> Tensor:
        """Returns ½ Σ d_i w_i²."""
        pairs = zip(self.decays(), self.weights, strict=True)
        penalties = [(decay * weight.square()).sum() for decay, weight in pairs]
        return torch.stack(penalties).sum() / 2
