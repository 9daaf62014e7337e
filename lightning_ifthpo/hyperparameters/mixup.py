"""Mixtures of training examples, of learned strength; in eval mode examples stay as they are."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_ifthpo.core.validation import is_ascending, require_at_least, require_flag
from lightning_ifthpo.hyperparameters.bounded import between

# Least concentration. There 97 % of the shares are within 0.1 of 0 or 1, so that hardly anything is mixed, and the
# temperature is 0.03, by which logits are divided.
_LEAST = 0.02


class Mixup(nn.Module):
    """Mixes each example with another one of the batch, and their targets alike, by learned shares (Zhang et al. 2018).

    An example becomes m x + (1 − m) x' and its target m y + (1 − m) y', with x' another example of the batch. The
    shares m are close to Beta(a, a), with learned concentration a: near zero hardly anything is mixed, at one m is
    uniform, and beyond that it gathers at one half.

    torch draws beta variates by rejection. With the same random numbers they jump when a changes, and they can be
    differentiated only once. So the shares are m = σ(logit(u) / t) with u ~ U(0, 1), a relaxed coin. The temperature t
    is such that logit m has the variance 2 ψ'(a) that it has for Beta(a, a). At a = 1 both are uniform; elsewhere their
    quantiles differ by less than 0.02 on average. In eval mode, and so in the outer loss, nothing is mixed.

    Args:
        classes: Number of classes C.
        initial: a at the start, between 0.02 and `maximum`.
        maximum: Upper bound of a.
        per_example: Whether each example has its own share m; otherwise all of a batch have the same, and the
            hypergradient is noisier.

    Raises:
        ValueError: If an argument is out of range; when called, if the targets are neither [B] nor [B, C].

    >>> mixup = Mixup(3, initial=0.4)
    >>> images, targets = mixup(torch.rand(4, 1, 8, 8), torch.tensor([0, 2, 2, 1]))
    >>> images.shape, targets.sum(1)
    (torch.Size([4, 1, 8, 8]), tensor([1., 1., 1., 1.]))
    >>> mixup.natural_values()
    tensor(0.4000)
    """

    unit = 1.0  # λ is a logarithm, or nearly so

    def __init__(self, classes: int, *, initial: float = 0.2, maximum: float = 4.0, per_example: bool = True) -> None:
        super().__init__()
        require_at_least("classes", classes, 2)
        require_flag("per_example", per_example)
        if not is_ascending(_LEAST, initial, maximum, math.inf):
            raise ValueError(
                f"expected {_LEAST:g} < initial < maximum < inf, got initial={initial!r} and maximum={maximum!r}"
            )
        self.classes, self.maximum, self.per_example = classes, maximum, per_example
        start = math.log((initial - _LEAST) / (maximum - initial))
        self.logit = nn.Parameter(torch.tensor(start), requires_grad=False)

    def extra_repr(self) -> str:
        """Returns the number of classes and the upper bound, for the module's repr."""
        return f"{self.classes}, maximum={self.maximum:g}, per_example={self.per_example}"

    def natural_values(self) -> Tensor:
        """Returns the concentration a of the shares, a scalar."""
        return between(self.logit, _LEAST, self.maximum)

    def forward(self, x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Returns mixed examples and targets [B, C] for `F.cross_entropy`; in eval mode x itself.

        Args:
            x: Floating-point examples [B, ...].
            targets: Class indices [B], or probabilities [B, C].
        """
        if not x.is_floating_point():
            raise TypeError(f"expected a floating-point input, got {x.dtype}; convert it before examples are mixed")
        if targets.shape not in (x.shape[:1], (len(x), self.classes)):
            raise ValueError(f"expected targets [{len(x)}] or [{len(x)}, {self.classes}], got {tuple(targets.shape)}")
        soft = (F.one_hot(targets.long(), self.classes) if targets.ndim == 1 else targets).to(x.dtype)
        if not self.training:
            return x, soft
        shares = self._shares(len(x) if self.per_example else 1).to(x.dtype)
        partners = torch.randperm(len(x), device=x.device)
        return _mixed(x, x[partners], shares), _mixed(soft, soft[partners], shares)

    def _shares(self, count: int) -> Tensor:
        """Returns m, [count], in float32 at least: half precision has too few numbers near 0 and 1."""
        a = self.natural_values().to(torch.promote_types(self.logit.dtype, torch.float32))
        # the variance of logit u is π²/3
        temperature = (math.pi**2 / 6.0 / torch.polygamma(1, a)).sqrt()
        # uniform_ draws 0 once in 2²⁵ numbers, where the derivative is not finite; eps is half of the next number
        return torch.sigmoid(a.new_empty(count).uniform_().logit(eps=2.0**-25) / temperature)


def _mixed(one: Tensor, other: Tensor, shares: Tensor) -> Tensor:
    return other + shares.view(-1, *[1] * (one.ndim - 1)) * (one - other)
