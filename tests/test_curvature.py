"""All operators against dense references, and through the structures that break naive products."""

import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_ifthpo.curvature import (
    AverageOperator,
    FiniteDifferenceOperator,
    GaussNewtonOperator,
    GradientOuterProductOperator,
    HessianOperator,
    KFACOperator,
    MatrixOperator,
    curvature_operator,
    mark_outputs,
)
from lightning_ifthpo.hypergradients.implicit import implicit_hypergradient
from lightning_ifthpo.solvers import Direct
from tests.problems import Net, relative_error, spd_matrix

OPERATORS = [HessianOperator, GaussNewtonOperator, FiniteDifferenceOperator]
# float64: double backward is exact to rounding; central differences leave cbrt(eps)² ≈ 4e-11 times third derivatives
TOLERANCE = {HessianOperator: 1e-12, GaussNewtonOperator: 1e-12, FiniteDifferenceOperator: 1e-7}


def batch():
    generator = torch.Generator().manual_seed(3)
    return torch.randn(8, 4, dtype=torch.float64, generator=generator), torch.arange(8) % 3


def functional(net, loss):
    """The loss as a function of the flat parameters, with buffers kept out of it."""
    names, shapes = zip(*[(n, p.shape) for n, p in net.named_parameters()], strict=True)

    def function(flat):
        parts = torch.split(flat, [s.numel() for s in shapes])
        parameters = {n: part.view(s) for n, part, s in zip(names, parts, shapes, strict=True)}
        buffers = {n: b.clone() for n, b in net.named_buffers()}
        return loss(lambda x: torch.func.functional_call(net, parameters | buffers, (x,)), flat)

    return function, torch.cat([p.detach().reshape(-1) for p in net.parameters()])


@pytest.mark.parametrize("operator_type", OPERATORS, ids=lambda t: t.__name__)
def test_linear_softmax_equals_the_dense_hessian(operator_type):
    """Where the model is linear, Gauss–Newton is the Hessian."""
    x, y = batch()
    net = nn.Linear(4, 3, dtype=torch.float64)
    operator = operator_type(lambda: F.cross_entropy(mark_outputs(net(x)), y), list(net.parameters()))
    function, flat = functional(net, lambda model, _: F.cross_entropy(model(x), y))
    assert relative_error(operator.to_dense(), torch.func.hessian(function)(flat)) < TOLERANCE[operator_type]


@pytest.mark.parametrize("operator_type", [HessianOperator, FiniteDifferenceOperator], ids=lambda t: t.__name__)
def test_network_with_batchnorm_equals_the_dense_hessian(operator_type):
    x, y = batch()
    net = Net(dropout=0.0)
    operator = operator_type(lambda: F.cross_entropy(net(x), y), list(net.parameters()))
    function, flat = functional(net, lambda model, _: F.cross_entropy(model(x), y))
    dense = torch.autograd.functional.hessian(function, flat)
    # the difference quotient sees BatchNorm's large third derivatives
    assert relative_error(operator.to_dense(), dense) < (1e-12 if operator_type is HessianOperator else 1e-6)


def reference_gauss_newton(net, x, y, penalty):
    """[Jᵀ I] ∇²L(z, w) [Jᵀ I]ᵀ from dense Jacobians."""
    function, flat = functional(net, lambda model, _: model(x).reshape(-1))
    z = function(flat)
    jacobian = torch.func.jacrev(function)(flat)
    extended = torch.cat([jacobian, torch.eye(flat.numel(), dtype=flat.dtype)])

    def loss(joined):
        outputs, weights = joined[: z.numel()], joined[z.numel() :]
        return F.cross_entropy(outputs.view(len(x), -1), y) + penalty(outputs, weights)

    curvature = torch.func.hessian(loss)(torch.cat([z, flat]))
    return extended.T @ curvature @ extended


PENALTIES = {
    "none": lambda z, w: 0.0 * w.sum(),
    "decay": lambda z, w: 0.1 * w.square().sum(),
    "quartic": lambda z, w: 0.1 * (w**4).sum(),
    "coupled to the outputs": lambda z, w: 0.1 * w.square().sum() * z.square().mean(),
}


@pytest.mark.parametrize("marking", ["marked", "returned", "both"])
@pytest.mark.parametrize("name", PENALTIES)
def test_gauss_newton_equals_its_dense_definition(name, marking):
    """The penalty's Hessian is added exactly, whether outputs are marked or returned."""
    x, y = batch()
    net, penalty = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double(), PENALTIES[name]

    def loss():
        z = net(x)
        z = z if marking == "returned" else mark_outputs(z)
        flat = torch.cat([p.reshape(-1) for p in net.parameters()])
        value = F.cross_entropy(z, y) + penalty(z.reshape(-1), flat)
        return value if marking == "marked" else (value, z)

    operator = GaussNewtonOperator(loss, list(net.parameters()))
    assert relative_error(operator.to_dense(), reference_gauss_newton(net, x, y, penalty)) < 1e-12


def test_gauss_newton_with_several_outputs():
    x, y = batch()
    net = nn.Linear(4, 6, dtype=torch.float64)

    def loss():
        first, second = net(x).split(3, dim=1)  # both come from one node of the graph
        return F.cross_entropy(mark_outputs(first), y) + mark_outputs(second).square().mean()

    hessian = HessianOperator(loss, list(net.parameters())).to_dense()
    assert relative_error(GaussNewtonOperator(loss, list(net.parameters())).to_dense(), hessian) < 1e-12


@pytest.mark.parametrize(
    "combine",
    [
        lambda first, second: first + second,
        lambda first, second: first - second,
        lambda first, second: first * second.detach() + 0.0 * second,
        lambda first, second: first - 3.0 * second,
    ],
    ids=["sum", "difference", "product", "one from the other"],
)
def test_gauss_newton_with_outputs_whose_slopes_hang_together(combine):
    weights = [torch.tensor([1.0, 2.0], requires_grad=True), torch.tensor([3.0, 1.0], requires_grad=True)]

    def loss():
        first, second = mark_outputs(2.0 * weights[0]), mark_outputs(3.0 * weights[1])
        return combine(first, second).square().sum()

    hessian = HessianOperator(loss, weights)
    operator = GaussNewtonOperator(loss, weights)
    assert torch.equal(operator.to_dense(), hessian.to_dense())  # the model is linear
    assert torch.equal(operator.gradient, hessian.gradient)


def test_gauss_newton_with_an_output_of_hyperparameters_alone():
    weight, target = torch.tensor([1.0, 2.0], requires_grad=True), torch.tensor(3.0, requires_grad=True)

    def loss():
        return (mark_outputs(2.0 * weight) - mark_outputs(2.0 * target)).square().sum()

    operator = GaussNewtonOperator(loss, [weight])
    assert torch.equal(operator.to_dense(), torch.diag(torch.tensor([8.0, 8.0])))
    (mixed,) = operator.mixed_product(torch.ones(2), [target])
    assert float(mixed) == -16.0


def test_gauss_newton_is_positive_semidefinite_where_the_hessian_is_not():
    x, y = batch()
    net = Net(dropout=0.0)

    def loss():
        return F.cross_entropy(mark_outputs(net(x)), y)

    parameters = list(net.parameters())
    gauss_newton = torch.linalg.eigvalsh(GaussNewtonOperator(loss, parameters).to_dense())
    hessian = torch.linalg.eigvalsh(HessianOperator(loss, parameters).to_dense())
    assert gauss_newton[0] > -1e-14
    assert hessian[0] < -1e-3


def test_gauss_newton_without_outputs_says_what_to_do():
    weight = torch.ones(2, requires_grad=True)
    with pytest.raises(ValueError, match="call mark_outputs"):
        GaussNewtonOperator(lambda: weight.square().sum(), [weight])


def test_gauss_newton_refuses_an_output_without_history():
    weight = torch.ones(2, requires_grad=True)
    with pytest.raises(ValueError, match="does not depend on any parameter"):
        GaussNewtonOperator(lambda: (weight.square().sum(), torch.ones(2)), [weight])


@pytest.mark.parametrize("operator_type", OPERATORS, ids=lambda t: t.__name__)
def test_one_symmetric_linear_map_under_dropout_and_batchnorm(operator_type):
    x, y = batch()
    net = Net()
    operator = operator_type(lambda: F.cross_entropy(mark_outputs(net(x)), y), list(net.parameters()))
    u, v = torch.randn(2, operator.size, dtype=torch.float64)
    tolerance = max(TOLERANCE[operator_type], 1e-6 if operator_type is FiniteDifferenceOperator else 0)
    image = operator.matvec(u)
    assert torch.allclose(operator.matvec(u), image, rtol=0, atol=1e-14)
    assert abs(v @ image - u @ operator.matvec(v)) <= tolerance * image.norm() * v.norm()
    assert relative_error(operator.matvec(2 * u - 3 * v), 2 * image - 3 * operator.matvec(v)) <= tolerance
    assert abs(operator.quadratic(u) - u @ image) <= tolerance * u.norm() * image.norm()


@pytest.mark.parametrize("operator_type", OPERATORS, ids=lambda t: t.__name__)
def test_odd_parameters_have_zero_blocks(operator_type):
    """Frozen, unused, linearly entering and (once) tied parameters; a channels-last convolution."""
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    convolution = nn.Conv2d(3, 2, 3, dtype=torch.float64).to(memory_format=torch.channels_last)
    frozen = torch.randn(2, dtype=torch.float64)
    unused = torch.randn(2, dtype=torch.float64, requires_grad=True)
    linear = torch.randn(2, dtype=torch.float64, requires_grad=True)

    def loss():
        z = convolution(x)
        z = mark_outputs(z + torch.nn.functional.conv2d(x.flip(0), convolution.weight))  # tied: used twice
        return z.square().mean() + linear.sum() + frozen.sum()

    parameters = [frozen, convolution.weight, unused, convolution.bias, linear]
    dense = operator_type(loss, parameters).to_dense()
    alive = slice(2, 2 + convolution.weight.numel())
    rest = [0, 1, alive.stop, alive.stop + 1, -2, -1]
    assert dense.shape == (62, 62)
    assert dense[rest].abs().max() == 0.0
    assert dense[:, rest].abs().max() == 0.0

    def of_weight(weight):
        z = F.conv2d(x, weight, convolution.bias) + F.conv2d(x.flip(0), weight)
        return z.square().mean()

    wanted = torch.func.hessian(of_weight)(convolution.weight.detach()).reshape(54, 54)
    assert relative_error(dense[alive, alive], wanted) < max(TOLERANCE[operator_type], 1e-8)


@pytest.mark.parametrize("operator_type", OPERATORS, ids=lambda t: t.__name__)
def test_mixed_product_equals_the_dense_mixed_derivative(operator_type):
    x, y = batch()
    net, hyper = nn.Linear(4, 3, dtype=torch.float64), torch.randn(3, dtype=torch.float64, requires_grad=True)

    def loss():
        z = mark_outputs(net(x) * hyper.exp())
        return F.cross_entropy(z, y) + hyper.sigmoid().sum() * net.weight.square().sum()

    operator = operator_type(loss, list(net.parameters()))
    v = torch.randn(operator.size, dtype=torch.float64)
    gradient = torch.autograd.grad(loss(), list(net.parameters()), create_graph=True)
    flat = torch.cat([g.reshape(-1) for g in gradient])
    wanted = torch.stack([torch.autograd.grad(entry, hyper, retain_graph=True)[0] for entry in flat]).T @ v
    (got,) = operator.mixed_product(v, [hyper])
    assert relative_error(got, wanted) < max(TOLERANCE[operator_type], 1e-8)


def test_finite_differences_leave_the_weights_bit_for_bit_and_no_gradient():
    x, y = batch()
    net = Net(dtype=torch.float32, dropout=0.5)
    before = [p.detach().clone() for p in net.parameters()]
    operator = FiniteDifferenceOperator(lambda: F.cross_entropy(net(x.float()), y), list(net.parameters()))
    random_state = torch.get_rng_state()
    for _ in range(10):
        operator.matvec(torch.randn(operator.size, generator=torch.Generator().manual_seed(0)))
    assert all(torch.equal(p, b) for p, b in zip(net.parameters(), before, strict=True))
    assert all(p.grad is None for p in net.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)


def test_finite_differences_restore_the_weights_after_an_exception():
    weight = torch.randn(3, dtype=torch.float64, requires_grad=True)
    before, calls = weight.detach().clone(), []

    def loss():
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("in the middle of a product")
        return weight.pow(3).sum()

    operator = FiniteDifferenceOperator(loss, [weight])
    with pytest.raises(RuntimeError, match="in the middle"):
        operator.matvec(torch.ones(3, dtype=torch.float64))
    assert torch.equal(weight.detach(), before)


def test_finite_differences_in_float32_are_accurate_to_1e_minus_3():
    x, y = batch()
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    parameters = list(net.parameters())

    def loss():
        return F.cross_entropy(net(x.float()), y)

    v = torch.randn(sum(p.numel() for p in parameters))
    exact = HessianOperator(loss, parameters).matvec(v)
    for scale in (1e-10, 1.0, 1e10):
        got = FiniteDifferenceOperator(loss, parameters).matvec(scale * v)
        assert relative_error(got, scale * exact) < 1e-3  # eps^(2/3) = 2.4e-5, times the third derivatives


@pytest.mark.parametrize("delta", [0.5, torch.tensor([1.0, 2.0])], ids=["number", "vector"])
def test_damped_adds_a_diagonal(delta):
    matrix = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
    wanted = matrix + torch.diag(torch.as_tensor(delta).expand(2))
    assert torch.equal(MatrixOperator(matrix).damped(delta).to_dense(), wanted)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda w: HessianOperator(lambda: w * 2, [w]), ValueError, r"expected a scalar, got shape \(2,\)"),
        (lambda w: HessianOperator(lambda: w.detach().sum(), [w]), ValueError, "is detached"),
        (lambda w: HessianOperator(lambda: 1.0, [w]), TypeError, "expected a scalar tensor, got float"),
        (lambda w: HessianOperator(lambda: w.sum(), [w]).matvec(torch.ones(3)), ValueError, r"\(2,\), got \(3,\)"),
        (lambda w: MatrixOperator(torch.ones(2, 3)), ValueError, "square matrix"),
        (lambda w: MatrixOperator(torch.tensor([[1.0, 2.0], [0.0, 1.0]])), ValueError, "symmetric matrix"),
        (lambda w: MatrixOperator(torch.eye(2)).damped(torch.ones(3)), ValueError, r"shape \(2,\), got \(3,\)"),
    ],
    ids=["vector loss", "detached", "float loss", "shape of v", "not square", "not symmetric", "damping"],
)
def test_refuses(make, error, message):
    with pytest.raises(error, match=message):
        make(torch.ones(2, requires_grad=True))


def test_average_is_weighted_and_makes_operators_anew():
    matrices = [spd_matrix(6, 10.0) * scale for scale in (1.0, 3.0)]
    made = []

    def make(index):
        made.append(index)
        return MatrixOperator(matrices[index])

    average = AverageOperator([partial(make, 0), partial(make, 1)], weights=[30, 10])
    assert torch.allclose(average.to_dense(), 0.75 * matrices[0] + 0.25 * matrices[1])
    assert made.count(1) == 6
    made.clear()
    alone = AverageOperator([partial(make, 1)], weights=[7])
    assert torch.allclose(alone.to_dense(), matrices[1])
    assert made == [1]  # the graph of a single batch is kept


def test_average_draws_the_same_dropout_masks_at_each_product():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Linear(6, 1)).double()
    x = torch.randn(5, 4, dtype=torch.float64)
    make = partial(HessianOperator, lambda: net(x).square().mean(), list(net.parameters()))
    average = AverageOperator([make, make], weights=[1, 2])
    before = torch.get_rng_state()
    dense = average.to_dense()
    assert torch.allclose(dense, dense.T, atol=1e-14)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("weights", [[1.0], [1.0, 0.0], [1.0, -1.0]], ids=str)
def test_average_refuses_weights_that_are_none(weights):
    make = partial(MatrixOperator, torch.eye(2))
    with pytest.raises(ValueError, match="expected a positive weight for each of 2 operators"):
        AverageOperator([make, make], weights)


def test_preconditioning_from_both_sides_keeps_symmetry():
    matrix, p = spd_matrix(6, 10.0, signs=True), torch.linspace(0, 2, 6, dtype=torch.float64)
    dense = MatrixOperator(matrix).preconditioned(p).to_dense()
    assert torch.allclose(dense, p.sqrt()[:, None] * matrix * p.sqrt())
    wanted = torch.linalg.eigvals(p[:, None] * matrix).real.sort().values
    assert torch.allclose(torch.linalg.eigvalsh(dense), wanted, atol=1e-12)
    with pytest.raises(ValueError, match=r"preconditioner of shape \(6,\), got \(5,\)"):
        MatrixOperator(matrix).preconditioned(p[:5])


def test_curvature_by_name():
    w = torch.tensor([1.0, 2.0], requires_grad=True)
    operator = curvature_operator("finite_difference", lambda: w.prod(), [w])
    assert isinstance(operator, FiniteDifferenceOperator)
    with pytest.raises(ValueError, match=r"expected curvature to be one of .*got 'fisher'"):
        curvature_operator("fisher", lambda: w.prod(), [w])


@pytest.mark.parametrize(
    "delta", [0.0, 0.3, torch.linspace(0.1, 1.0, 15, dtype=torch.float64)], ids=["0", "0.3", "vector"]
)
def test_the_outer_product_of_the_gradient_and_its_inverse_equal_the_dense_ones(delta):
    x, y = batch()
    net = nn.Linear(4, 3, dtype=torch.float64)
    parameters = list(net.parameters())
    operator = GradientOuterProductOperator(lambda: F.cross_entropy(net(x), y), parameters)
    g = torch.cat([g.reshape(-1) for g in torch.autograd.grad(F.cross_entropy(net(x), y), parameters)])
    assert relative_error(operator.to_dense(), torch.outer(g, g)) < 1e-14
    b = torch.linspace(-1, 1, 15, dtype=torch.float64)
    result = Direct(damping=delta, max_size=1).solve(operator, b)
    dense = torch.outer(g, g) + torch.diag(torch.as_tensor(delta, dtype=torch.float64).expand(15))
    assert relative_error(result.x, torch.linalg.pinv(dense, hermitian=True) @ b) < 1e-9
    assert (result.products, result.extra_products) == (0, 1)


def test_the_outer_product_of_a_vanishing_gradient_has_no_inverse():
    w = torch.zeros(3, requires_grad=True)
    operator = GradientOuterProductOperator(lambda: w.square().sum(), [w])
    assert torch.equal(Direct().solve(operator, torch.ones(3)).x, torch.zeros(3))


def kfac_data(examples):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(examples, 4, dtype=torch.float64, generator=generator)
    return x, torch.randn(examples, 2, dtype=torch.float64, generator=generator).softmax(dim=1)


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
    net = nn.Linear(4, 2, dtype=torch.float64)
    loss = kfac_problem(net)
    kfac = KFACOperator(loss, list(net.parameters()))
    exact = HessianOperator(loss, list(net.parameters()))
    assert relative_error(kfac.to_dense(), exact.to_dense()) < 1e-12
    assert relative_error(kfac.gradient, exact.gradient) < 1e-12
    b = torch.linspace(-1, 1, 10, dtype=torch.float64)
    got, wanted = (Direct(damping=0.1).solve(operator, b) for operator in (kfac, exact))
    assert relative_error(got.x, wanted.x) < 1e-10
    assert got.products == 0


def two_layers():
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()


def test_kfac_of_two_layers_has_a_block_for_each_and_its_own_inverse():
    net = two_layers()
    kfac = KFACOperator(kfac_problem(net), list(net.parameters()))
    dense = kfac.to_dense()
    assert not dense[:15, 15:].any()
    assert dense[:15, :15].any()
    b = torch.linspace(-1, 1, 23, dtype=torch.float64)
    wanted = torch.linalg.solve(dense + 0.1 * torch.eye(23, dtype=torch.float64), b)
    assert relative_error(Direct(damping=0.1).solve(kfac, b).x, wanted) < 1e-10


@pytest.mark.parametrize("criterion", [nn.functional.mse_loss, nn.functional.cross_entropy, binary])
def test_kfac_of_a_single_example_is_the_exact_block_of_each_layer(criterion):
    net = two_layers()
    loss = kfac_problem(net, criterion, examples=1)
    kfac, exact = (kind(loss, list(net.parameters())).to_dense() for kind in (KFACOperator, GaussNewtonOperator))
    for block in (slice(0, 15), slice(15, 23)):
        assert relative_error(kfac[block, block], exact[block, block]) < 1e-12


def test_kfac_averages_inputs_and_adds_curvatures_of_the_outputs():
    net = nn.Linear(4, 2, bias=False, dtype=torch.float64)
    x, _ = kfac_data(8)
    p = net(x).detach().softmax(dim=1)
    softmax = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
    wanted = torch.kron(softmax.mean(dim=0), x.T @ x / 8)
    got = KFACOperator(kfac_problem(net, nn.functional.cross_entropy), [net.weight]).to_dense()
    assert relative_error(got, wanted) < 1e-12


def test_kfac_takes_the_positive_part_of_a_loss_that_is_not_convex():
    net = nn.Linear(4, 2, dtype=torch.float64)
    loss = kfac_problem(net, heteroscedastic, examples=1)
    exact, got = (kind(loss, list(net.parameters())).to_dense() for kind in (GaussNewtonOperator, KFACOperator))
    values, vectors = torch.linalg.eigh(exact)
    assert values.min() < -0.1 < 0.1 < values.max()
    # of one example and one layer, the positive part of JᵀLJ is J times that of L, as J is a multiple of an isometry
    assert relative_error(got, vectors * values.clamp_min(0.0) @ vectors.T) < 1e-10


def test_kfac_draws_the_same_dropout_masks_for_both_of_its_passes():
    """A network that is nothing but its mask would have curvature zero where two masks differ."""
    dropout, layer = nn.Dropout(0.5), nn.Linear(64, 1, bias=False, dtype=torch.float64)

    recorded = []

    def once():
        mask = dropout(torch.ones(1, 64, dtype=torch.float64))
        recorded.append(mask)
        z = layer(mask)
        return z.square().sum() / 2, z

    before = torch.get_rng_state()
    KFACOperator(once, [layer.weight])
    assert len(recorded) == 2
    assert torch.equal(*recorded)
    torch.set_rng_state(before)
    assert torch.equal(dropout(torch.ones(1, 64, dtype=torch.float64)), recorded[0])


def test_kfac_takes_the_geometric_mean_of_a_damping_for_each_weight():
    net = two_layers()
    kfac = KFACOperator(kfac_problem(net), list(net.parameters()))
    b = torch.linspace(-1, 1, 23, dtype=torch.float64)
    uneven = torch.tensor([0.01, 1.0], dtype=torch.float64).repeat(12)[:23]
    mean = float(uneven.log().mean().exp())
    assert torch.allclose(kfac.solve(b, uneven), kfac.solve(b, mean), rtol=1e-12)
    even, rough = (Direct(damping=damping).solve(kfac, b) for damping in (mean, uneven))
    assert even.relative_residual < 1e-10
    assert rough.relative_residual > 0.1


def test_kfac_makes_hypergradients():
    net = nn.Linear(4, 2, dtype=torch.float64)
    loss = kfac_problem(net)
    shift = torch.zeros(2, dtype=torch.float64)

    def inner():
        return loss() + (net.bias * shift).sum()

    def outer():
        return (net.weight.square().sum() + net.bias.square().sum()) / 2

    solver = Direct(damping=0.1)
    got, wanted = (
        implicit_hypergradient(inner, outer, list(net.parameters()), [shift], curvature=curvature, solver=solver)
        for curvature in ("kfac", "hessian")
    )
    assert relative_error(got.gradients[0], wanted.gradients[0]) < 1e-10


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
    net = net().double()
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
    net, beside = two_layers(), nn.Linear(4, 1, dtype=torch.float64)
    whole = KFACOperator(kfac_problem(net), list(net.parameters()))
    net[frozen].requires_grad_(False)
    loss, parameters = kfac_problem(net), [*net.parameters(), *beside.parameters()]

    part = KFACOperator(lambda: loss() + beside.weight.square().sum(), parameters)
    idle = {*net[frozen].parameters(), *beside.parameters()}
    zero = torch.cat([torch.full((parameter.numel(),), parameter in idle) for parameter in parameters])
    dense = torch.zeros(28, 28, dtype=torch.float64)
    dense[:23, :23] = whole.to_dense()
    dense[zero], dense[:, zero] = 0.0, 0.0
    assert torch.allclose(part.to_dense(), dense, rtol=1e-12)
    b = torch.linspace(-1, 1, 28, dtype=torch.float64)
    damped = dense + 0.1 * torch.eye(28, dtype=torch.float64)
    assert relative_error(part.solve(b, 0.1), torch.linalg.solve(damped, b)) < 1e-10


def test_an_error_leaves_no_hooks_on_the_layers():
    net = two_layers()
    loss, calls = kfac_problem(net), []
    net[0].register_forward_hook(lambda *_: calls.append(1))

    def failing():
        result = loss()
        if len(calls) == 2:
            raise MemoryError
        return result

    with pytest.raises(MemoryError):
        KFACOperator(failing, list(net.parameters()))
    assert [len(layer._forward_hooks) + len(layer._forward_pre_hooks) for layer in net] == [1, 0, 0]


def test_a_layer_that_is_not_asked_for_may_be_of_any_kind():
    augment, net = nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect", dtype=torch.float64), two_layers()
    loss = kfac_problem(lambda x: net(augment(x.view(8, 1, 2, 2)).flatten(1)))
    assert KFACOperator(loss, list(net.parameters())).size == 23


@pytest.mark.parametrize("operator", [GaussNewtonOperator, KFACOperator])
def test_outputs_marked_twice_on_one_way_are_refused(operator):
    net = two_layers()

    def loss():
        return mark_outputs(2.0 * mark_outputs(net(torch.ones(3, 4, dtype=torch.float64)))).square().sum()

    with pytest.raises(ValueError, match="depends on another one; mark only the last"):
        operator(loss, list(net.parameters()))


def test_kfac_says_what_is_missing(monkeypatch):
    net = nn.Linear(4, 2, dtype=torch.float64)
    loss, parameters = kfac_problem(net), list(net.parameters())
    with pytest.raises(ValueError, match="needs damping > 0"):
        Direct().solve(KFACOperator(loss, parameters), torch.ones(10, dtype=torch.float64))
    with pytest.raises(ValueError, match="mark_outputs"):
        KFACOperator(lambda: net(torch.ones(1, 4, dtype=torch.float64)).sum(), parameters)
    monkeypatch.setitem(sys.modules, "curvlinops", None)
    with pytest.raises(ImportError, match=r"pip install 'lightning_ifthpo\[kfac\]'"):
        KFACOperator(loss, parameters)
