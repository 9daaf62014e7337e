"""What is learned about labels that may be wrong: how classes are confused, and what a single label should be."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from typing_extensions import Self

from lightning_ifthpo.core.validation import is_ascending, require_at_least, require_classified, require_labels
from lightning_ifthpo.hyperparameters.per_example import PerExample

# Least entry of a matrix to start from, relative to its row. A softmax has no zeros, and the logarithm of a smaller
# number is so far from the others that hyper steps would hardly reach it.
_LEAST = 1e-3


class LabelTransition(nn.Module):
    """The probabilities T[c, k] that the label k is given to an example whose true class is c; rows sum to one.

    Call it between the network and the training loss: it turns logits of the true class into log-probabilities of the
    given label, log Σ_c p(c|x) T[c, k]. This is the forward correction of Patrini et al. (2017), with a matrix that is
    learned on checked examples. The network's own logits, for the outer loss and for predictions, then speak of true
    classes. Mark the result as outputs, not the logits: in them the loss is convex.

    A call takes memory for C² numbers per example, so it suits up to a few hundred classes.

    Args:
        classes: Number of classes C.
        initial: Probability that a label is right at the start, in (0, 1), the same for each class. Or a matrix [C, C]
            to start from, such as `natural_values()` or counts of confusions; its rows are scaled to sum to one, and
            entries below 0.1 % of their row are raised to that.

    Raises:
        ValueError: If an argument is out of range; when called, if there are not C logits.

    >>> transition = LabelTransition(3, initial=0.8)
    >>> transition(torch.tensor([[20.0, 0.0, 0.0]])).exp()
    tensor([[0.8000, 0.1000, 0.1000]])
    """

    unit = 1.0  # λ is a logarithm
    is_for_training_loss = True

    def __init__(self, classes: int, *, initial: float | Tensor = 0.9) -> None:
        require_at_least("classes", classes, 2)
        super().__init__()
        self.classes = classes
        matrix = initial if isinstance(initial, Tensor) else _diagonal(classes, initial)
        self.logits = nn.Parameter(_log_rows(matrix, (classes, classes)), requires_grad=False)

    @classmethod
    def from_predictions(cls, logits: Tensor, labels: Tensor) -> Self:
        """Returns the transition that a network trained on given labels shows on checked examples.

        Each row is the mean prediction for the examples of a class: the estimate of gold loss correction (Hendrycks et
        al. 2018), and a better start than the same probability for all classes. Train the network without correction,
        and stop while it generalizes.

        Args:
            logits: What the network says of checked examples, [n, C].
            labels: Their true classes, integers [n]; each class must be among them.

        Raises:
            ValueError: If shapes do not fit, a logit is not finite, or a class has no example.

        >>> logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 3.0]])
        >>> LabelTransition.from_predictions(logits, torch.tensor([0, 1, 1])).natural_values()
        tensor([[0.8808, 0.1192],
                [0.1582, 0.8418]])
        """
        require_classified(logits, labels)
        labels, classes = labels.to(logits.device).long(), logits.shape[1]
        counts = torch.bincount(labels, minlength=classes)
        if not bool(counts.all()):
            missing = ", ".join(map(str, (counts == 0).nonzero().flatten().tolist()))
            raise ValueError(f"expected checked examples of each class, got none of class {missing}")
        sums = logits.new_zeros(classes, classes).index_add_(0, labels, logits.detach().softmax(1))
        return cls(classes, initial=sums / counts.unsqueeze(1))

    def natural_values(self) -> Tensor:
        """Returns T, [C, C]: a row for each true class, a column for each given label."""
        return self.logits.softmax(1)

    def forward(self, logits: Tensor) -> Tensor:
        """Returns log-probabilities of the given labels [..., C], for `F.cross_entropy`, from logits [..., C]."""
        if logits.ndim == 0 or logits.shape[-1] != self.classes:
            raise ValueError(f"expected logits [..., {self.classes}], got shape {tuple(logits.shape)}")
        joint = logits.log_softmax(-1).unsqueeze(-1) + self.logits.log_softmax(1)
        return joint.logsumexp(-2)


class SoftLabels(PerExample):
    """Learned targets, a distribution over C classes for each training example; they start close to the given labels.

    Use them as targets of `F.cross_entropy`; `IndexedDataset` adds the index of each example to the batch.

    Args:
        labels: Given labels, integers [n].
        classes: Number of classes C.
        initial: Probability of the given label at the start, in (0, 1); the others share the rest.

    Raises:
        ValueError: If an argument is out of range, or labels are not integers [n] from 0 to C − 1.
        IndexError: When called, if an index is n or larger.

    >>> SoftLabels(torch.tensor([2, 0]), classes=3, initial=0.8)(torch.tensor([1]))
    tensor([[0.8000, 0.1000, 0.1000]])
    """

    unit = 1.0  # λ is a logarithm
    is_for_training_loss = True

    def __init__(self, labels: Tensor, classes: int, *, initial: float = 0.9) -> None:
        require_at_least("classes", classes, 2)
        require_labels("labels", labels, classes)
        super().__init__()
        start = _diagonal(classes, initial).log()
        self.logits = nn.Parameter(start[labels.cpu().long()], requires_grad=False)

    def natural_values(self) -> Tensor:
        """Returns the targets, [n, C]."""
        return self.logits.softmax(1)

    def forward(self, index: Tensor) -> Tensor:
        """Returns the targets [B, C] of the examples with these indices, integers [B]."""
        return self.rows(index).softmax(1)


def _diagonal(classes: int, right: float) -> Tensor:
    """Returns the matrix [C, C] of labels that are right with the same probability in each class."""
    if not is_ascending(0.0, right, 1.0):
        raise ValueError(f"expected 0 < initial < 1, the probability that a label is right, got {right!r}")
    return torch.full((classes, classes), (1.0 - right) / (classes - 1)).fill_diagonal_(right)


def _log_rows(matrix: Tensor, shape: tuple[int, int]) -> Tensor:
    """Returns the logarithms of the rows, each scaled to sum to one."""
    matrix = matrix.detach().to(torch.get_default_dtype())
    if tuple(matrix.shape) != shape:
        raise ValueError(f"expected initial of shape {shape}, got {tuple(matrix.shape)}")
    sums = matrix.sum(1, keepdim=True)
    if not (bool(matrix.isfinite().all()) and bool((matrix >= 0.0).all()) and bool((sums > 0.0).all())):
        raise ValueError("expected initial without negative or infinite entries, and no row of zeros alone")
    return (matrix / sums).clamp_min(_LEAST).log().log_softmax(1)
