"""Hypergradients in plain PyTorch, without Lightning, and a check that they are right.

Ridge regression with one penalty for each of 13 features. `implicit_hypergradient` takes two losses without arguments,
the weights and the hyperparameters. `check_hypergradient` compares it with finite differences of inner problems that
are solved again for each difference, as `torch.autograd.gradcheck` does for gradients.

    python examples/plain_torch.py
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from sklearn.datasets import load_wine
from torch import Tensor

from lightning_ifthpo import check_hypergradient, implicit_hypergradient
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

    def inner_loss(self) -> Tensor:
        """Returns what the weights minimize."""
        x, y = self.inner
        return (x @ self.w - y).square().mean() + (self.log_penalties.exp() * self.w.square()).sum()

    def outer_loss(self) -> Tensor:
        """Returns what the penalties minimize."""
        x, y = self.outer
        return (x @ self.w - y).square().mean()

    def fit(self) -> None:
        """Sets the weights to the minimum of the inner loss."""
        x, y = self.inner
        with torch.no_grad():
            matrix = x.T @ x / len(y) + torch.diag(self.log_penalties.exp())
            self.w.copy_(torch.linalg.solve(matrix, x.T @ y / len(y)))

    @torch.no_grad()
    def test_loss(self) -> float:
        """Returns the squared error on data that were used for nothing."""
        x, y = self.test
        return float((x @ self.w - y).square().mean())


def main() -> dict[str, dict[str, float]]:
    """Checks one hypergradient, then descends along fifty; returns what the last line says."""
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
    expected = json.loads(Path(__file__).with_name("results.json").read_text()).get("plain_torch", {})
    output = {name: {"measured": round(value, 4), "expected": expected.get(name)} for name, value in measured.items()}
    print(json.dumps(output))
    return output


if __name__ == "__main__":
    main()
