"""Which solver, and what a failed solve says
=============================================

Choose a solver, and read what a failed solve says.

Before training has converged the Hessian has negative eigenvalues. Conjugate gradients then stop at negative curvature,
and the result says so: it carries a status, a residual and a diagnosis. Gauss–Newton curvature is positive
semi-definite, so that they succeed. At the minimum a dense solve gives the exact hypergradient, and the cosine with it
shows how good the other solvers are.

    python examples/solvers.py
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from lightning_ifthpo import implicit_hypergradient
from lightning_ifthpo.curvature import Curvature, mark_outputs
from lightning_ifthpo.solvers import ConjugateGradient, Direct, Identity, MinimumResidual, Neumann, Nystrom, Solver

SOLVERS: dict[str, Solver] = {
    "Identity": Identity(step_size=0.5),
    "Neumann, 20 terms": Neumann(terms=20),
    "Nyström, rank 20": Nystrom(rank=20, damping=1e-2),
    "CG, 20 iterations": ConjugateGradient(max_iterations=20),
    "MINRES, 20 iterations": MinimumResidual(max_iterations=20),
}


class Problem:
    """A network with eight hidden units, and one weight decay for each of its weights."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        pixels, labels = load_digits(return_X_y=True)
        images, self.digits = torch.tensor(pixels) / 16, torch.tensor(labels)
        self.images = F.avg_pool2d(images.view(-1, 1, 8, 8), 2).flatten(1)  # 16 pixels, so that a dense solve is cheap
        self.net = nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 10)).double()
        self.weights = list(self.net.parameters())
        self.log_decays = [torch.full_like(weight, 1e-2).log().detach() for weight in self.weights]

    def inner_loss(self) -> Tensor:
        """Returns the loss of 200 digits, and the penalties."""
        logits = mark_outputs(self.net(self.images[:200]))
        pairs = zip(self.log_decays, self.weights, strict=True)
        penalties = [(log_decay.exp() * weight.square()).sum() for log_decay, weight in pairs]
        return F.cross_entropy(logits, self.digits[:200]) + torch.stack(penalties).sum() / 2

    def outer_loss(self) -> Tensor:
        """Returns the loss of other digits."""
        return F.cross_entropy(self.net(self.images[200:600]), self.digits[200:600])

    def train(self, iterations: int) -> None:
        """Goes towards the minimum of the inner loss."""
        optimizer = torch.optim.LBFGS(
            self.weights, max_iter=iterations, tolerance_grad=1e-9, tolerance_change=0.0, line_search_fn="strong_wolfe"
        )

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = self.inner_loss()
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        optimizer.step(closure)  # type: ignore[no-untyped-call]

    def hypergradient(self, solver: Solver, curvature: Curvature = "hessian") -> tuple[Tensor, str, str]:
        """Returns the hypergradient as one vector, the status of the solve and its diagnosis."""
        losses = (self.inner_loss, self.outer_loss, self.weights, self.log_decays)
        result = implicit_hypergradient(*losses, solver=solver, curvature=curvature)
        vector = torch.cat([gradient.flatten() for gradient in result.gradients])
        print(f"  {type(solver).__name__:18}{curvature:14}{result.status.value:20}{result.products:3} products")
        return vector, result.status.value, result.diagnosis


def main() -> dict[str, dict[str, float | str]]:
    """Solves after a few iterations and at the minimum; returns what the last line says."""
    problem = Problem()
    problem.train(10)
    print("on the way:")
    _, status, diagnosis = problem.hypergradient(ConjugateGradient(max_iterations=20))
    print(f"  {diagnosis}")
    _, remedied, _ = problem.hypergradient(ConjugateGradient(max_iterations=20), "gauss_newton")

    problem.train(5000)
    print("at the minimum:")
    exact, _, _ = problem.hypergradient(Direct())
    measured: dict[str, float | str] = {"status on the way": status, "with Gauss–Newton": remedied}
    for name, solver in SOLVERS.items():
        vector, _, _ = problem.hypergradient(solver)
        measured[f"cosine, {name}"] = round(float(F.cosine_similarity(vector, exact, dim=0)), 3)
    expected = json.loads(Path(__file__).with_name("results.json").read_text()).get("solvers", {})
    result = {name: {"measured": value, "expected": expected.get(name)} for name, value in measured.items()}
    print(json.dumps(result, ensure_ascii=False))
    return result


if __name__ == "__main__":
    main()
