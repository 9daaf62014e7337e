"""Without Lightning
====================

Hypergradients in plain PyTorch, without Lightning, and a check that they are right.

Ridge regression with one penalty for each of 13 features. `implicit_hypergradient` takes two losses without arguments,
the weights and the hyperparameters. `check_hypergradient` compares it with finite differences of inner problems that
are solved again for each difference, as `torch.autograd.gradcheck` does for gradients.

`influence` is a hypergradient in one weight for each training example. It predicts what leaving one out does to the
outer loss, and fits without each of the 30 examples show how well. It is a first-order prediction, and each of so few
examples moves the weights far.

    python examples/plain_torch.py
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from sklearn.datasets import load_wine
from torch import Tensor

from lightning_ifthpo import check_hypergradient, implicit_hypergradient, influence
from lightning_ifthpo.solvers import ConjugateGradient


class Ridge:
    """Predicts the class number of wines, with a penalty for each feature."""

    def __init__(self) -> None:
        features, classes = load_wine(return_X_y=True)
        x = torch.tensor(features)
        x, y = (x - x.mean(0)) / x.std(0), torch.tensor(classes, dtype=x.dtype) - 1.0
        order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
        inner, outer, test = torch.split(order, [30, 74, 74])
        self.inner, self.outer, self.test = ((x[part], y[part]) for part in (inner, outer, test))
        self.w = torch.zeros(13, dtype=x.dtype, requires_grad=True)
        self.log_penalties = torch.full((13,), -3.0, dtype=x.dtype)

    def losses(self) -> Tensor:
        """Returns the loss of each training example."""
        x, y = self.inner
        return (x @ self.w - y).square()

    def penalty(self) -> Tensor:
        """Returns what the training loss adds to their mean."""
        return (self.log_penalties.exp() * self.w.square()).sum()

    def inner_loss(self) -> Tensor:
        """Returns what the weights minimize."""
        return self.losses().mean() + self.penalty()

    def outer_loss(self) -> Tensor:
        """Returns what the penalties minimize."""
        x, y = self.outer
        return (x @ self.w - y).square().mean()

    @torch.no_grad()
    def fit(self, without: int | None = None) -> None:
        """Sets the weights to the minimum of the inner loss, or of what is left of it without one example."""
        x, y = self.inner
        counts = torch.ones_like(y)
        counts[[] if without is None else without] = 0.0
        matrix = x.T * counts @ x / len(y) + torch.diag(self.log_penalties.exp())
        self.w.copy_(torch.linalg.solve(matrix, x.T @ (counts * y) / len(y)))

    @torch.no_grad()
    def change_without(self, index: int) -> float:
        """Returns how the outer loss changes when a training example is left out, by fitting again."""
        self.fit()
        before = self.outer_loss()
        self.fit(without=index)
        return float(self.outer_loss() - before)

    @torch.no_grad()
    def test_loss(self) -> float:
        """Returns the squared error on data that were used for nothing."""
        x, y = self.test
        return float((x @ self.w - y).square().mean())


def main() -> dict[str, dict[str, float]]:
    """Checks a hypergradient, descends along fifty, and predicts 30 fits; returns what the last line says."""
    ridge = Ridge()
    ridge.fit()
    losses = (ridge.inner_loss, ridge.outer_loss, [ridge.w], [ridge.log_penalties])
    print("the hypergradient is right:", check_hypergradient(*losses, reference="finite_difference"))

    start = ridge.test_loss()
    optimizer = torch.optim.Adam([ridge.log_penalties], lr=0.2)
    for _ in range(50):
        ridge.fit()
        result = implicit_hypergradient(*losses, solver=ConjugateGradient(max_iterations=50, rtol=1e-8))
        (ridge.log_penalties.grad,) = result.gradients
        optimizer.step()
    ridge.fit()
    print(f"status of the last solve: {result.status.value}, relative residual {result.relative_residual:.0e}")

    measured = {"test loss, equal penalties": start, "test loss, tuned penalties": ridge.test_loss()}
    predicted = influence(ridge.losses, ridge.outer_loss, [ridge.w], penalty=ridge.penalty).removal
    print(f"the wine that helps most is number {int(predicted.argmax())}, and {int(predicted.argmin())} harms most")
    found = torch.tensor([ridge.change_without(index) for index in range(len(predicted))])
    measured["correlation of influence with fits"] = float(torch.corrcoef(torch.stack([predicted, found]))[0, 1])
    expected = json.loads(Path(__file__).with_name("results.json").read_text()).get("plain_torch", {})
    output = {name: {"measured": round(value, 4), "expected": expected.get(name)} for name, value in measured.items()}
    print(json.dumps(output))
    return output


if __name__ == "__main__":
    main()
