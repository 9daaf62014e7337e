"""The linear hypernetwork."""

import pytest
import torch

from lightning_ifthpo import (
    LinearBestResponse,
    implicit_hypergradient,
)
from lightning_ifthpo.solvers import (
    Direct,
)
from tests.helpers.device import DEVICE, FLOAT64
from tests.helpers.problems import relative_error, spd_matrix


def test_a_linear_hypernetwork_learns_the_jacobian_of_the_best_response():
    """On a quadratic, exactly −H⁻¹ ∂²L/∂w∂λᵀ, and the hypergradient with it."""
    matrix, mixed = spd_matrix(5, 10.0, dtype=torch.float64), torch.linspace(-1, 1, 15, **FLOAT64).view(5, 3)
    h = torch.tensor([0.3, -0.2, 0.5], **FLOAT64)
    w = torch.zeros(5, **FLOAT64, requires_grad=True)

    def inner():
        return w @ matrix @ w / 2 + w @ mixed @ h

    def outer():
        return (w - 1).square().sum() + h.sum()

    with torch.no_grad():
        w.copy_(-torch.linalg.solve(matrix, mixed @ h))
    before = w.detach().clone()
    response = LinearBestResponse(inner, [w], [h], lr=0.19, generator=torch.Generator(DEVICE).manual_seed(0))
    for _ in range(600):
        response.step()
    assert relative_error(response.jacobian, -torch.linalg.solve(matrix, mixed)) < 1e-6
    exact = implicit_hypergradient(inner, outer, [w], [h], solver=Direct()).gradients[0]
    assert relative_error(response.hypergradient(outer).gradients[0], exact) < 1e-6
    assert torch.equal(w.detach(), before)


def test_a_hypernetwork_perturbs_by_its_scale_and_refuses_none():
    seen = []
    h, w = torch.zeros(4, **FLOAT64), torch.ones(4, **FLOAT64, requires_grad=True)

    def inner():
        seen.append(h.clone())
        return (w * h).sum() + w.square().sum()

    LinearBestResponse(inner, [w], [h], lr=0.1, scale=0.25, generator=torch.Generator(DEVICE).manual_seed(0)).step()
    wanted = 0.25 * torch.randn(4, **FLOAT64, generator=torch.Generator(DEVICE).manual_seed(0))
    assert torch.equal(seen[0], wanted)
    assert torch.equal(seen[1], -wanted)
    for options in ({"lr": 0.0}, {"lr": 0.1, "scale": -1.0}):
        with pytest.raises(ValueError, match="lr > 0 and scale > 0"):
            LinearBestResponse(inner, [w], [h], **options)


def test_perturbations_come_from_the_generator():
    h, w = torch.zeros(4, **FLOAT64), torch.ones(4, **FLOAT64, requires_grad=True)

    def learned(seed):
        generator = torch.Generator(DEVICE).manual_seed(seed)
        response = LinearBestResponse(lambda: (w * h).sum() + w.square().sum(), [w], [h], lr=0.1, generator=generator)
        response.step()
        return response.jacobian

    assert torch.equal(learned(5), learned(5))
    assert not torch.allclose(learned(5), learned(6))
