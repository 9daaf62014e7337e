"""The question that started it: a Neumann series that explodes, and why.

A regression network after one epoch of SGD; the terms of the series with step size one grow by 2.75 each, because the
Hessian has an eigenvalue −1.749. No step size helps.
"""

import itertools
import re

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ifthpo import implicit_hypergradient
from lightning_ifthpo.solvers import ConjugateGradient, Neumann, Status
from tests.helpers.problems import relative_error

PRINTED = torch.tensor(
    [
        [0.1156, -0.1112, -0.1701, 0.1533, 0.2598],
        [0.3945, -0.2782, -0.4173, 0.3951, 0.6880],
        [1.1269, -0.6591, -0.9736, 1.0918, 1.9326],
        [3.2012, -1.5501, -2.2807, 2.9116, 5.2814],
        [8.9077, -3.6360, -5.3440, 7.9048, 14.5893],
        [24.7851, -8.5381, -12.5502, 21.3749, 40.1064],
        [68.6840, -20.1017, -29.5685, 58.0873, 110.4438],
        [190.1629, -47.4884, -69.9186, 157.9792, 303.8438],
        [525.7173, -112.6450, -166.0421, 430.5572, 836.0579],
        [1452.1401, -268.4406, -396.2061, 1174.8359, 2299.8997],
    ]
)


@pytest.fixture(scope="module")
def problem():
    """The network of the question, trained for its one epoch."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(123)
        x = torch.randn(1000, 1)
        y = 2 * x + 1 + 0.1 * torch.randn(1000, 1)
        x_val = torch.randn(1000, 1)
        y_val = 2 * x_val + 1 + 0.1 * torch.randn(1000, 1)
        loader = DataLoader(TensorDataset(x, y), batch_size=32, shuffle=True)
        net = nn.Sequential(nn.Linear(1, 8), nn.ReLU(), nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 1))
        decay = torch.tensor(0.1)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01, weight_decay=0.1)
        for batch, target in loader:
            optimizer.zero_grad()
            nn.functional.mse_loss(net(batch), target).backward()
            optimizer.step()

    def inner():
        penalty = sum(p.square().sum() for p in net.parameters()) / 2
        return nn.functional.mse_loss(net(x), y) + decay * penalty

    def outer():
        return nn.functional.mse_loss(net(x_val), y_val)

    return inner, outer, list(net.parameters()), [decay]


def test_without_a_safeguard_the_printed_terms_are_reproduced(problem):
    def partial_sum(terms):
        solver = Neumann(terms=terms, step_size=1.0, safeguard=False)
        return implicit_hypergradient(*problem, solver=solver, diagnosed=False).solution.x

    sums = [partial_sum(terms) for terms in range(11)]
    terms = torch.stack([(later - earlier)[:5] for earlier, later in itertools.pairwise(sums)])
    # four decimals were printed, and a difference of two sums in float32 loses as much
    assert torch.allclose(terms, PRINTED, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("solver", [Neumann(), Neumann(step_size=1.0), ConjugateGradient(max_iterations=50)], ids=repr)
def test_with_the_safeguard_the_cause_is_named(problem, solver):
    result = implicit_hypergradient(*problem, solver=solver)
    assert result.status is Status.NEGATIVE_CURVATURE
    assert bool(torch.isfinite(result.gradients[0]))
    assert result.solution.x.norm() < 1e3
    smallest, largest = re.search(r"λ_min = (\S+), λ_max = ([\d.]+)", result.diagnosis).groups()
    assert float(smallest) == pytest.approx(-1.749, rel=1e-2)
    assert float(largest) == pytest.approx(2.118, rel=1e-2)
    assert "Gauss–Newton" in result.diagnosis


def test_default_settings_do_not_return_nonsense(problem):
    result = implicit_hypergradient(*problem)
    assert result.status is Status.NEGATIVE_CURVATURE
    assert bool(torch.isfinite(result.gradients[0]))


def test_damping_above_the_negative_curvature_cures_it(problem):
    result = implicit_hypergradient(*problem, solver=ConjugateGradient(max_iterations=200, rtol=1e-5, damping=1.9))
    assert result.status is Status.CONVERGED
    series = implicit_hypergradient(*problem, solver=Neumann(terms=300, damping=1.9))
    assert series.status is Status.COMPLETE
    assert relative_error(series.gradients[0].reshape(1), result.gradients[0].reshape(1)) < 1e-2
