"""A table of the examples whose labels are most likely wrong."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_ifthpo.core.validation import require_at_least, require_classified


@dataclass(frozen=True, eq=False)
class LabelIssues:
    """Examples of a data set, those first whose label is most likely wrong. Columns have the names of cleanlab.

    Attributes:
        index: Number of each example in the data set, integers [n].
        is_label_issue: Whether the given label differs from the likely one, bool [n].
        label_score: Probability that the given label is right, [n], ascending.
        given_label: [n], integers.
        predicted_label: The likely label, [n], integers.
        margin: Logit of the given label minus the largest other one, [n].
        weight: Learned weight of each example, [n], or None if there are none.

    >>> issues = label_issues(torch.tensor([[4.0, 0.0], [3.0, 0.0]]), torch.tensor([0, 1]))
    >>> issues.index[issues.is_label_issue]
    tensor([1])
    """

    index: Tensor
    is_label_issue: Tensor
    label_score: Tensor
    given_label: Tensor
    predicted_label: Tensor
    margin: Tensor
    weight: Tensor | None = None

    def __len__(self) -> int:
        return len(self.index)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yields a row for each example."""
        columns = self.columns()
        lists = [column.tolist() for column in columns.values()]
        return (dict(zip(columns, row, strict=True)) for row in zip(*lists, strict=True))

    def __str__(self) -> str:
        """Returns the first ten rows as text."""
        flagged = int(self.is_label_issue.sum())
        cells = [list(self.columns()), *([_short(value) for value in row.values()] for row in self.head(10))]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]
        return "\n".join([f"{flagged} of {len(self)} labels are likely to be wrong; the worst first", *lines])

    def columns(self) -> dict[str, Tensor]:
        """Returns the columns by name; without `weight` if there is none."""
        return {name: column for name, column in vars(self).items() if column is not None}

    def head(self, n: int) -> LabelIssues:
        """Returns the n first rows, n >= 0."""
        require_at_least("n", n, 0)
        return LabelIssues(**{name: column[:n] for name, column in self.columns().items()})

    def to_pandas(self) -> Any:
        """Returns a `pandas.DataFrame`, whose index is the number of the example; needs pandas."""
        import pandas as pd  # type: ignore[import-untyped]

        return pd.DataFrame({name: column.numpy() for name, column in self.columns().items()}).set_index("index")

    def to_csv(self, path: str | Path) -> None:
        """Writes the table as comma-separated values."""
        with Path(path).open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(self.columns()))
            writer.writeheader()
            writer.writerows(self)


def label_issues(
    logits: Tensor, labels: Tensor, *, weights: Tensor | None = None, transition: Tensor | None = None
) -> LabelIssues:
    """Ranks the labels of a data set by how likely they are wrong, after a run that learned which ones to trust.

    The network that was trained with learned weights, or with a `LabelTransition`, has not fitted the wrong labels, so
    that its own predictions tell them apart. Learned weights do so less well, and next to a transition hardly at all.
    Keeps some copies of the logits in float64.

    Args:
        logits: What the tuned network says of each example, [n, C], in eval mode; or the mean over several epochs or
            networks, which is steadier.
        labels: The labels that the examples were given, integers [n].
        weights: Learned weights [n], such as `SampleWeights.natural_values()`; shown in the table.
        transition: Matrix [C, C], such as `LabelTransition.natural_values()`. With it the score is the posterior
            p(c|x) T[c, y] / Σ_k p(k|x) T[k, y] at c = y, and the likely label is the class where it is largest.

    Raises:
        ValueError: If shapes do not fit, or a logit is not finite.

    >>> logits = torch.tensor([[4.0, 0.0], [3.0, 0.0], [0.0, 2.0]])
    >>> print(label_issues(logits, torch.tensor([0, 1, 1])))
    1 of 3 labels are likely to be wrong; the worst first
    index  is_label_issue  label_score  given_label  predicted_label  margin
        1            True         0.05            1                0   -3.00
        2           False         0.88            1                1    2.00
        0           False         0.98            0                0    4.00
    """
    require_classified(logits, labels)
    count, classes = logits.shape
    logits, labels = logits.detach().cpu().double(), labels.cpu().long()
    columns = {"weights": (weights, (count,)), "transition": (transition, (classes, classes))}
    for name, (value, shape) in columns.items():
        if value is not None and tuple(value.shape) != shape:
            raise ValueError(
                f"expected {name} of shape {shape}, as there are logits {(count, classes)}, got {tuple(value.shape)}"
            )
    joint = logits.log_softmax(1)
    if transition is not None:
        matrix = transition.detach().cpu().double()
        if not bool(((matrix >= 0.0) & matrix.isfinite()).all()) or not bool(matrix.sum(0)[labels].all()):
            raise ValueError("expected transition without negative or infinite entries, and no column of zeros alone")
        joint = joint + matrix.log().T[labels]
    score = joint.softmax(1).gather(1, labels[:, None]).squeeze(1)
    likely = torch.where(joint.amax(1) > joint.gather(1, labels[:, None]).squeeze(1), joint.argmax(1), labels)
    order = score.argsort(stable=True)
    return LabelIssues(
        index=order,
        is_label_issue=(likely != labels)[order],
        label_score=score[order],
        given_label=labels[order],
        predicted_label=likely[order],
        margin=label_margins(logits, labels)[order],
        weight=None if weights is None else weights.detach().cpu().double()[order],
    )


def label_margins(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns the logit of each given label minus the largest other one, [n]; logits: [n, C], labels: [n].

    Its mean over a run is the area under the margin (Pleiss et al. 2020), which ranks labels that are wrong at random.

    Raises:
        ValueError: If shapes do not fit, there are fewer than two classes, or a logit is not finite.

    >>> label_margins(torch.tensor([[4.0, 1.0, 0.0]]), torch.tensor([1]))
    tensor([-3.])
    """
    require_classified(logits, labels)
    chosen = labels.long().unsqueeze(1)
    others = logits.scatter(1, chosen, -torch.inf).amax(1)
    return logits.gather(1, chosen).squeeze(1) - others


def _short(value: Any) -> str:
    """Returns a value of the table, numbers with two decimals."""
    return f"{value:.2f}" if isinstance(value, float) else str(value)
