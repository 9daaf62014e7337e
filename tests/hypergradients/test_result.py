"""Both terms of a hypergradient, and what is said of its quality."""

import pytest
import torch

from lightning_ifthpo import (
    implicit_hypergradient,
)
from lightning_ifthpo.core.loss import Loss
from lightning_ifthpo.hypergradients.result import OuterGradient, combine
from lightning_ifthpo.solvers import (
    Direct,
    SolveResult,
    Status,
)
from tests.helpers.device import DEVICE, FLOAT64


def test_direct_and_indirect_terms_have_their_signs():
    """L_T = (w − λ)²/2 and L_V = wλ: w* = λ, and d(λ²)/dλ = 2λ, half of it direct."""
    lam = torch.tensor(3.0, **FLOAT64)
    w = torch.tensor([3.0], **FLOAT64, requires_grad=True)
    result = implicit_hypergradient(lambda: ((w - lam) ** 2 / 2).sum(), lambda: (w * lam).sum(), [w], [lam])
    assert [t.item() for t in (result.direct[0], result.indirect[0], result.gradients[0])] == pytest.approx([3, 3, 6])


def test_a_hyperparameter_of_the_outer_loss_alone_has_its_direct_term():
    w, lam = torch.ones(1, requires_grad=True, device=DEVICE), torch.tensor(2.0, device=DEVICE)
    result = implicit_hypergradient(lambda: w.square().sum(), lambda: (lam * w.square()).sum(), [w], [lam])
    assert result.gradients[0].item() == pytest.approx(1.0)


@pytest.mark.parametrize("where", ["inner", "outer", "direct"])
def test_nan_ends_in_a_status(where):
    w, lam = torch.ones(2, requires_grad=True, device=DEVICE), torch.tensor(1.0, device=DEVICE)
    bad = {name: torch.nan if name == where else 1.0 for name in ("inner", "outer", "direct")}
    result = implicit_hypergradient(
        lambda: (bad["inner"] * lam * w.square()).sum(),
        lambda: (bad["outer"] * w.square()).sum() + bad["direct"] * lam,
        [w],
        [lam],
    )
    assert result.status is Status.NONFINITE
    assert "NaN" in result.diagnosis


def test_an_unused_hyperparameter_is_an_error_that_says_what_to_do():
    w, lam, lr = (
        torch.ones(1, requires_grad=True, device=DEVICE),
        torch.tensor(1.0, device=DEVICE),
        torch.tensor([0.1, 0.2], device=DEVICE),
    )
    losses = (lambda: (lam * w.square()).sum(), lambda: w.sum(), [w], [lam, lr])
    with pytest.raises(ValueError, match=r"hyperparameter 1, of shape \(2,\), does not influence.*ExactGeN or a sweep"):
        implicit_hypergradient(*losses)
    result = implicit_hypergradient(*losses, allow_unused=True)
    assert result.unused == (1,)
    assert result.gradients[1].tolist() == [0.0, 0.0]


def test_no_hyperparameter_is_unused_that_another_process_uses():
    """The other process is played: it does the same, but for a derivative that this one does not have."""
    w, used, idle = (
        torch.ones(1, requires_grad=True, device=DEVICE),
        torch.tensor(1.0, device=DEVICE),
        torch.tensor(1.0, device=DEVICE),
    )

    def all_reduce(part):
        sums.append(part)
        return part + torch.tensor([0.0, 1.0, 0.0, 0.25], device=DEVICE) if part.numel() == 4 else part

    sums = []
    inner = Loss(lambda: (w.square() / 2 - used * w).sum(), [w], all_reduce=all_reduce)
    outer = Loss(lambda: w.sum(), [w], all_reduce=all_reduce)
    result = implicit_hypergradient(inner, outer, [w], [used, idle], solver=Direct())
    assert [part.tolist() for part in sums if part.numel() == 4] == [[1.0, 0.0, -1.0, 0.0]]
    assert [gradient.item() for gradient in result.gradients] == pytest.approx([1.0, -0.25])
    assert result.unused == ()


@pytest.mark.parametrize("where", ["outer loss", "inner loss", "direct", "indirect"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_each_term_that_is_not_finite_shows_in_the_status(where, value):
    numbers = {name: torch.tensor(value if name == where else 1.0) for name in (
        "nothing", "outer loss", "inner loss", "direct", "indirect"
    )}  # fmt: skip
    solution = SolveResult(torch.ones(2), 0.0, 3, Status.CONVERGED)

    def status(at):
        outer = OuterGradient(at["outer loss"], torch.ones(2), [at["direct"]])
        return combine(outer, [torch.tensor(2.0)], [at["indirect"]], [at["inner loss"]], solution).status

    assert status(numbers) is Status.NONFINITE
    assert status(dict.fromkeys(numbers, torch.tensor(1.0))) is Status.CONVERGED


def test_the_outer_loss_comes_without_its_graph():
    w, lam = torch.ones(1, requires_grad=True, device=DEVICE), torch.tensor(2.0, device=DEVICE)
    result = implicit_hypergradient(lambda: w.square().sum(), lambda: (lam * w.square()).sum(), [w], [lam])
    assert result.outer_loss.item() == 2.0
    assert not any(tensor.requires_grad for tensor in (result.outer_loss, *result.gradients, result.solution.x))
