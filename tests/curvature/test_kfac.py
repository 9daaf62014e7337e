"""KFAC where it is exact, and what it refuses."""

import sys

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_ifthpo import Loss, implicit_hypergradient
from lightning_ifthpo.curvature import (
    GaussNewtonOperator,
    HessianOperator,
    KFACOperator,
    mark_outputs,
)
from lightning_ifthpo.solvers import Direct
from tests.helpers.device import DEVICE, WHERE, random_state, set_random_state, within
from tests.helpers.networks import two_layers
from tests.helpers.problems import relative_error


def kfac_data(examples):
    generator = torch.Generator().manual_seed(3)
    x, y = (torch.randn(examples, width, dtype=torch.float64, generator=generator) for width in (4, 2))
    return x.to(**WHERE), y.softmax(dim=1).to(**WHERE)


def kfac_problem(net, criterion=nn.functional.mse_loss, examples=8):
    x, y = kfac_data(examples)
    return lambda: criterion(mark_outputs(net(x)), y)


def binary(logits, y):
    return nn.functional.binary_cross_entropy_with_logits(logits, y.round(), reduction="sum")


def heteroscedastic(outputs, y):
    """A loss that no library knows, whose curvature has signs of both kinds."""
    mean, log_deviation = outputs[:, 0], outputs[:, 1]
    return ((mean - y[:, 0]).square() * torch.exp(-2 * log_deviation) / 2 + log_deviation).mean()


def test_kfac_is_the_exact_hessian_of_one_linear_layer_with_squared_error():
    net = nn.Linear(4, 2).to(**WHERE)
    loss = kfac_problem(net)
    kfac = KFACOperator(loss, list(net.parameters()))
    exact = HessianOperator(loss, list(net.parameters()))
    assert relative_error(kfac.to_dense(), exact.to_dense()) < within(1e-12)
    assert relative_error(kfac.gradient, exact.gradient) < within(1e-12)
    b = torch.linspace(-1, 1, 10, **WHERE)
    got, wanted = (Direct(damping=0.1).solve(operator, b) for operator in (kfac, exact))
    assert relative_error(got.x, wanted.x) < within(1e-10)
    assert got.products == 0


def test_kfac_of_two_layers_has_a_block_for_each_and_its_own_inverse():
    net = two_layers()
    kfac = KFACOperator(kfac_problem(net), list(net.parameters()))
    dense = kfac.to_dense()
    assert not dense[:15, 15:].any()
    assert dense[:15, :15].any()
    b = torch.linspace(-1, 1, 23, **WHERE)
    wanted = torch.linalg.solve(dense + 0.1 * torch.eye(23, **WHERE), b)
    assert relative_error(Direct(damping=0.1).solve(kfac, b).x, wanted) < within(1e-10)


@pytest.mark.parametrize("criterion", [nn.functional.mse_loss, nn.functional.cross_entropy, binary])
def test_kfac_of_a_single_example_is_the_exact_block_of_each_layer(criterion):
    net = two_layers()
    loss = kfac_problem(net, criterion, examples=1)
    kfac, exact = (kind(loss, list(net.parameters())).to_dense() for kind in (KFACOperator, GaussNewtonOperator))
    for block in (slice(0, 15), slice(15, 23)):
        assert relative_error(kfac[block, block], exact[block, block]) < within(1e-12)


def test_kfac_averages_inputs_and_adds_curvatures_of_the_outputs():
    net = nn.Linear(4, 2, bias=False).to(**WHERE)
    x, _ = kfac_data(8)
    p = net(x).detach().softmax(dim=1)
    softmax = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
    wanted = torch.kron(softmax.mean(dim=0), x.T @ x / 8)
    got = KFACOperator(kfac_problem(net, nn.functional.cross_entropy), [net.weight]).to_dense()
    assert relative_error(got, wanted) < within(1e-12)


def test_kfac_takes_the_positive_part_of_a_loss_that_is_not_convex():
    net = nn.Linear(4, 2).to(**WHERE)
    loss = kfac_problem(net, heteroscedastic, examples=1)
    exact, got = (kind(loss, list(net.parameters())).to_dense() for kind in (GaussNewtonOperator, KFACOperator))
    values, vectors = torch.linalg.eigh(exact)
    assert values.min() < -0.1 < 0.1 < values.max()
    # of one example and one layer, the positive part of JᵀLJ is J times that of L, as J is a multiple of an isometry
    assert relative_error(got, vectors * values.clamp_min(0.0) @ vectors.T) < within(1e-10)


def test_kfac_draws_the_same_dropout_masks_for_both_of_its_passes():
    """A network that consists of its mask alone would have curvature zero where two masks differ."""
    dropout, layer = nn.Dropout(0.5), nn.Linear(64, 1, bias=False).to(**WHERE)

    recorded = []

    def once():
        mask = dropout(torch.ones(1, 64, **WHERE))
        recorded.append(mask)
        z = layer(mask)
        return z.square().sum() / 2, z

    before = random_state()
    KFACOperator(once, [layer.weight])
    assert len(recorded) == 2
    assert torch.equal(*recorded)
    set_random_state(before)
    assert torch.equal(dropout(torch.ones(1, 64, **WHERE)), recorded[0])


def test_kfac_takes_the_geometric_mean_of_a_damping_for_each_weight():
    net = two_layers()
    kfac = KFACOperator(kfac_problem(net), list(net.parameters()))
    b = torch.linspace(-1, 1, 23, **WHERE)
    uneven = torch.tensor([0.01, 1.0], **WHERE).repeat(12)[:23]
    mean = float(uneven.log().mean().exp())
    assert torch.allclose(kfac.solve(b, uneven), kfac.solve(b, mean), rtol=within(1e-12))
    even, rough = (Direct(damping=damping).solve(kfac, b) for damping in (mean, uneven))
    assert even.relative_residual < within(1e-10)
    assert rough.relative_residual > 0.1


def test_kfac_makes_hypergradients():
    net = nn.Linear(4, 2).to(**WHERE)
    loss = kfac_problem(net)
    shift = torch.zeros(2, **WHERE)

    def inner():
        return loss() + (net.bias * shift).sum()

    def outer():
        return (net.weight.square().sum() + net.bias.square().sum()) / 2

    solver = Direct(damping=0.1)
    got, wanted = (
        implicit_hypergradient(inner, outer, list(net.parameters()), [shift], curvature=curvature, solver=solver)
        for curvature in ("kfac", "hessian")
    )
    assert relative_error(got.gradients[0], wanted.gradients[0]) < within(1e-10)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.first(x))[:, :2]


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(self.layer(x))[:, :2]


class Standardized(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x, self.weight - self.weight.mean(), self.bias)


class Circular(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(1, 2, 2, padding=1, padding_mode="circular")

    def forward(self, x):
        return self.layer(x.view(8, 1, 2, 2)).mean(dim=(2, 3))


class Grouped(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(2, 2, 1, groups=2)

    def forward(self, x):
        return self.layer(x.view(8, 2, 2, 1)).mean(dim=(2, 3))


class Unbatched(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x):
        return torch.stack([self.layer(x[0])] * 8)


class Patches(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(2, 3), nn.Linear(6, 2)

    def forward(self, x):
        return self.second(self.first(x.view(16, 2)).view(8, 6))


def contrastive(outputs, y):
    return (outputs @ outputs.T).logsumexp(dim=1).mean()


@pytest.mark.parametrize(
    ("net", "criterion", "message"),
    [
        (Tied, nn.functional.mse_loss, r"of shape \(4, 4\) is shared between layers"),
        (Twice, nn.functional.mse_loss, "used several times"),
        (lambda: nn.Sequential(nn.Linear(4, 2), nn.LayerNorm(2)), nn.functional.mse_loss, "belongs to no Linear"),
        (lambda: Standardized(4, 2), nn.functional.mse_loss, "belongs to no Linear"),
        (Circular, nn.functional.mse_loss, "padding_mode='circular'"),
        (Patches, nn.functional.mse_loss, r"same number of examples, got \[8, 16\]"),
        (lambda: nn.Linear(4, 2), contrastive, "couples them"),
        (Grouped, nn.functional.mse_loss, "groups=2"),
        (Unbatched, nn.functional.mse_loss, r"called with shape \(4,\)"),
    ],
)
def test_kfac_refuses_what_it_cannot_express(net, criterion, message):
    net = net().to(**WHERE)
    with pytest.raises(ValueError, match=message):
        KFACOperator(kfac_problem(net, criterion), list(net.parameters()))


def test_kfac_of_a_network_with_checkpointed_activations_is_the_same():
    """Which repeats the forward pass in each backward pass."""
    net = two_layers()
    plain, repeated = (
        KFACOperator(kfac_problem(call), list(net.parameters())).to_dense()
        for call in (net, lambda x: checkpoint(net, x, use_reentrant=False))
    )
    assert torch.equal(plain, repeated)


@pytest.mark.parametrize("frozen", [0, 2])
def test_frozen_and_unused_parameters_have_blocks_of_zeros(frozen):
    net, other = two_layers(), nn.Linear(4, 1).to(**WHERE)
    whole = KFACOperator(kfac_problem(net), list(net.parameters()))
    net[frozen].requires_grad_(False)
    loss, parameters = kfac_problem(net), [*net.parameters(), *other.parameters()]

    part = KFACOperator(lambda: loss() + other.weight.square().sum(), parameters)
    idle = {*net[frozen].parameters(), *other.parameters()}
    zero = torch.cat([torch.full((parameter.numel(),), parameter in idle, device=DEVICE) for parameter in parameters])
    dense = torch.zeros(28, 28, **WHERE)
    dense[:23, :23] = whole.to_dense()
    dense[zero], dense[:, zero] = 0.0, 0.0
    assert torch.allclose(part.to_dense(), dense, rtol=within(1e-12))
    b = torch.linspace(-1, 1, 28, **WHERE)
    damped = dense + 0.1 * torch.eye(28, **WHERE)
    assert relative_error(part.solve(b, 0.1), torch.linalg.solve(damped, b)) < within(1e-10)


def test_an_error_leaves_no_hooks_on_the_layers():
    net = two_layers()
    loss, evaluations = kfac_problem(net), []
    net[0].register_forward_hook(lambda *_: None)

    def failing():
        evaluations.append(1)
        result = loss()
        if len(evaluations) == 2:
            raise MemoryError
        return result

    with pytest.raises(MemoryError):
        KFACOperator(failing, list(net.parameters()))
    assert [len(layer._forward_hooks) + len(layer._forward_pre_hooks) for layer in net] == [1, 0, 0]


def test_a_layer_that_is_not_asked_for_may_be_of_any_kind():
    augment, net = nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect", **WHERE), two_layers()
    loss = kfac_problem(lambda x: net(augment(x.view(8, 1, 2, 2)).flatten(1)))
    assert KFACOperator(loss, list(net.parameters())).size == 23


def test_kfac_says_what_is_missing(monkeypatch):
    net = nn.Linear(4, 2).to(**WHERE)
    loss, parameters = kfac_problem(net), list(net.parameters())
    with pytest.raises(ValueError, match="needs damping > 0"):
        Direct().solve(KFACOperator(loss, parameters), torch.ones(10, **WHERE))
    with pytest.raises(ValueError, match="mark_outputs"):
        KFACOperator(lambda: net(torch.ones(1, 4, **WHERE)).sum(), parameters)
    monkeypatch.setitem(sys.modules, "curvlinops", None)
    with pytest.raises(ImportError, match=r"pip install 'lightning_ifthpo\[kfac\]'"):
        KFACOperator(loss, parameters)


@pytest.mark.parametrize("options", [{"all_reduce": torch.clone}, {"scale": 2.0}], ids=["processes", "loss scale"])
def test_kfac_of_a_share_or_of_a_scaled_loss_is_refused(options):
    net = nn.Linear(4, 2).to(**WHERE)
    loss = Loss(kfac_problem(net), list(net.parameters()), **options)
    with pytest.raises(ValueError, match="needs all examples in one process"):
        KFACOperator(loss, list(net.parameters()))
