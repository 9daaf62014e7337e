"""What the graph of a loss shows."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint
from torchvision.ops import roi_align

from lightning_ifthpo.core.functions import twice_differentiable_functions
from lightning_ifthpo.core.graph import (
    SecondDerivativeError,
    check_differentiable,
    custom_functions,
    nodes,
    second_derivatives_of,
)
from lightning_ifthpo.core.loss import Loss
from lightning_ifthpo.curvature import (
    FiniteDifferenceOperator,
    GaussNewtonOperator,
    HessianOperator,
    mark_outputs,
)
from tests.helpers.brought import Once
from tests.helpers.device import randn


def test_every_node_is_visited_once():
    w = torch.ones(2, requires_grad=True)
    square = w * w
    names = [node.name() for node in nodes([(square + square).sum(), None])]
    assert sorted(names) == ["AddBackward0", "MulBackward0", "SumBackward0", "torch::autograd::AccumulateGrad"]


def test_functions_of_the_user_are_named():
    w = torch.ones(2, requires_grad=True)
    assert custom_functions([Once.apply(w).tanh()]) == ["Once"]
    assert custom_functions([w.tanh()]) == []
    assert custom_functions([torch.ones(1)]) == []


LOSSES = {
    "custom": lambda w: Once.apply(w).square().sum(),
    "below other operations": lambda w: (Once.apply(w.tanh()) * w).exp().sum(),
    "gamma": lambda w: torch.distributions.Dirichlet(w.exp()).rsample().square().sum(),
}


@pytest.mark.parametrize("operator", [HessianOperator, GaussNewtonOperator])
@pytest.mark.parametrize("name", LOSSES)
def test_a_backward_pass_that_can_be_differentiated_only_once_is_found(name, operator):
    w = randn(3, seed=0).requires_grad_()
    with pytest.raises(SecondDerivativeError, match=r"the loss goes through _?(Once|Dirichlet), whose"):
        operator(lambda: (lambda z: (z, z))(LOSSES[name](w)), [w]).gradient  # noqa: B018


def test_once_differentiable_functions_of_constants_are_no_fault():
    w, x = randn(3, seed=0).requires_grad_(), randn(3, seed=1).requires_grad_(False)
    HessianOperator(lambda: (w * Once.apply(x)).tanh().sum(), [w]).matvec(torch.ones_like(w))


def test_a_verified_loss_is_not_searched():
    w = randn(3, seed=0).requires_grad_()
    loss = Loss(lambda: LOSSES["custom"](w), [w], is_verified=True)
    assert loss.graph().gradient.shape == (3,)


def test_an_unnamed_function_is_a_custom_function():
    w = torch.ones(1, requires_grad=True)
    (gradient,) = torch.autograd.grad(Once.apply(w).square().sum(), w, create_graph=True)
    with pytest.raises(SecondDerivativeError, match="goes through a custom function"):
        check_differentiable([gradient], torch.ones(1), "the loss")


@pytest.mark.parametrize(
    "function",
    [
        F.hardsigmoid,
        lambda w: F.scaled_dot_product_attention(*3 * [w.expand(1, 1, 4, 4)]),
        lambda w: F.ctc_loss(w.expand(6, 1, 4).log_softmax(2), torch.tensor([[1, 2]]), [6], [2]),
        lambda w: roi_align(w.view(1, 1, 2, 2), [torch.tensor([[0.0, 0.0, 2.0, 2.0]])], 2),
    ],
    ids=["hardsigmoid", "fused attention", "CTC", "roi_align"],
)
def test_operations_without_a_second_derivative_are_said_in_words(function):
    w = torch.linspace(-1, 1, 4).requires_grad_()
    operator = HessianOperator(lambda: function(w).square().sum(), [w])
    message = r"^the loss has no second derivative \(.*\); use curvature='finite_difference'$"
    with pytest.raises(SecondDerivativeError, match=message) as caught:
        operator.matvec(torch.ones(4))
    assert str(caught.value).startswith(caught.value.cause)
    assert "use curvature" not in caught.value.cause
    with pytest.raises(SecondDerivativeError, match=message):
        operator.mixed_product(torch.ones(4), [w])


@pytest.mark.parametrize("kind", [RuntimeError, ValueError])
def test_other_errors_pass(kind):
    with pytest.raises(kind, match="something else"), second_derivatives_of("the loss"):
        raise kind("something else")


def layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def in_closure(net, x, reentrant):
    return checkpoint(lambda z: net(z), x.clone().requires_grad_(), use_reentrant=reentrant)


def in_layers(net, x, reentrant):
    z = x.clone().requires_grad_()
    for layer in net:
        z = checkpoint(layer, z, use_reentrant=reentrant)
    return z


@pytest.mark.parametrize("forward", [in_closure, in_layers])
@pytest.mark.parametrize("operator", [HessianOperator, GaussNewtonOperator])
def test_weights_inside_a_reentrant_checkpoint_take_part(forward, operator):
    net, x, y = layers(), torch.randn(16, 4, generator=torch.Generator().manual_seed(1)), torch.arange(16) % 3
    products = [
        operator(lambda z=z: F.cross_entropy(mark_outputs(z()), y), list(net.parameters())).matvec(torch.ones(67))
        for z in (lambda: net(x), lambda: forward(net, x, True), lambda: forward(net, x, False))
    ]
    assert torch.allclose(products[1], products[0], rtol=1e-4, atol=1e-6)
    assert torch.allclose(products[2], products[0], rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize("normalize", [parametrizations.weight_norm, nn.utils.weight_norm], ids=["new", "old"])
@pytest.mark.parametrize("dim", [0, 1, -1, None])
def test_weight_norm_has_a_right_second_derivative(normalize, dim):
    """That of torch's fused function is asymmetric."""
    net = nn.Sequential(normalize(nn.Linear(4, 5), dim=dim), nn.Tanh(), nn.Linear(5, 1)).double()
    x = torch.randn(7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    loss, weights = (lambda: net(x).square().sum()), list(net.parameters())
    exact, differences = (op(loss, weights).to_dense() for op in (HessianOperator, FiniteDifferenceOperator))
    assert torch.allclose(exact, exact.T, atol=1e-12)
    assert torch.allclose(exact, differences, atol=1e-6)


class Clipped:
    """A network whose gradients are changed by hooks on weights."""

    def __init__(self, hook):
        self.net = layers()
        for weight in self.net.parameters():
            weight.register_hook(hook)


@pytest.mark.parametrize("operator", [HessianOperator, GaussNewtonOperator, FiniteDifferenceOperator])
def test_hooks_on_weights_do_not_act_on_products(operator):
    x, y, seen = torch.randn(16, 4, generator=torch.Generator().manual_seed(1)), torch.arange(16) % 3, []
    clipped = Clipped(lambda gradient: (seen.append(1), gradient.clamp(-1e-3, 1e-3))[1]).net
    products = [
        operator(lambda net=net: F.cross_entropy(mark_outputs(net(x)), y), list(net.parameters())).matvec(
            torch.ones(67)
        )
        for net in (layers(), clipped)
    ]
    assert torch.equal(*products)
    assert not seen
    F.cross_entropy(clipped(x), y).backward()
    assert len(seen) == 4


def test_a_reentrant_checkpoint_of_constants_gives_no_gradient_as_in_training():
    net, x = layers(), torch.ones(2, 4)
    with twice_differentiable_functions():
        output = checkpoint(net, x, use_reentrant=True)
    assert not output.requires_grad


def test_checkpoints_are_reentrant_again_after_the_block():
    x = torch.ones(2, requires_grad=True)
    with twice_differentiable_functions():
        assert custom_functions([checkpoint(torch.tanh, x, use_reentrant=True)]) == []
    assert custom_functions([checkpoint(torch.tanh, x, use_reentrant=True)]) == ["CheckpointFunction"]
