"""Eigenvalues, trace and density, against known spectra and dense eigenvalues."""

import copy
import math
from functools import partial
from statistics import mean, median

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import wasserstein_distance as _wasserstein_distance
from torch import nn

from lightning_ifthpo.curvature import HessianOperator, MatrixOperator
from lightning_ifthpo.spectrum import SpectrumTracker, lanczos, power_iteration, spectral_density, trace
from tests.problems import digits_data, spd_matrix


def wasserstein_distance(values, others, weights):
    return _wasserstein_distance(values.numpy(), others.numpy(), weights.numpy())


def test_both_ends_of_nearly_equal_magnitude():
    """A power iteration returns anything between −0.92 and 0.85 here, "converged"."""
    values = torch.cat([torch.tensor([1.001, -1.002]), torch.linspace(-0.3, 0.3, 200)]).double()
    result = lanczos(MatrixOperator(torch.diag(values)), rtol=1e-8)
    assert result.converged
    assert result.largest.item() == pytest.approx(1.001, abs=1e-6)
    assert result.smallest.item() == pytest.approx(-1.002, abs=1e-6)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("scale", [1e-10, 1.0, 1e10])
def test_dense_reference_and_bounds(k, scale):
    matrix = scale * spd_matrix(60, 1e3, signs=True)
    values = torch.linalg.eigvalsh(matrix)
    for max_iterations in (5, 12, 60):
        result = lanczos(MatrixOperator(matrix), k=k, max_iterations=max_iterations, rtol=1e-9)
        for found, bounds in ((result.largest, result.largest_bounds), (result.smallest, result.smallest_bounds)):
            distance = (found[:, None] - values[None]).abs().amin(1)
            assert bool((distance <= bounds + 1e-12 * scale * 1e3).all())
        assert result.products <= max_iterations
    assert result.converged
    assert torch.allclose(result.largest, values.flip(0)[:k], rtol=1e-8, atol=0)
    assert torch.allclose(result.smallest, values[:k], rtol=1e-8, atol=0)


def test_multiple_eigenvalues_are_found_after_the_krylov_space_is_exhausted():
    values = torch.tensor([2.0, 2.0, -1.0, -1.0, 0.5, 0.5], dtype=torch.float64)
    result = lanczos(MatrixOperator(torch.diag(values)), k=2, max_iterations=6, rtol=1e-10)
    assert result.largest[0].item() == pytest.approx(2.0)
    assert result.smallest[0].item() == pytest.approx(-1.0)


def test_multiple_of_the_identity_takes_one_product():
    result = lanczos(MatrixOperator(3.0 * torch.eye(5, dtype=torch.float64)))
    assert (result.largest.item(), result.smallest.item()) == pytest.approx((3.0, 3.0))
    assert (result.products, result.converged) == (1, True)


def test_zero_operator():
    result = lanczos(MatrixOperator(torch.zeros(4, 4)))
    assert (result.largest.item(), result.smallest.item(), result.converged) == (0.0, 0.0, True)


def test_nan_is_neither_converged_nor_an_endless_loop():
    operator = MatrixOperator(torch.eye(4))
    operator.matrix = torch.full((4, 4), torch.nan)
    result = lanczos(operator)
    assert not result.converged
    assert bool(result.largest.isnan().all())


def test_a_good_start_saves_products_and_a_generator_changes_the_start():
    matrix = spd_matrix(80, 1e3)
    _, vectors = torch.linalg.eigh(matrix)
    cold = lanczos(MatrixOperator(matrix), rtol=1e-3)
    start = vectors[:, -1] + vectors[:, 0] + 1e-3 * torch.randn(80, dtype=torch.float64)
    warm = lanczos(MatrixOperator(matrix), rtol=1e-3, start=start)
    assert warm.products < cold.products
    other = lanczos(MatrixOperator(matrix), max_iterations=3, generator=torch.Generator().manual_seed(5))
    same = lanczos(MatrixOperator(matrix), max_iterations=3, generator=torch.Generator().manual_seed(5))
    assert other.largest == same.largest
    assert other.largest != lanczos(MatrixOperator(matrix), max_iterations=3).largest


def test_a_start_in_an_invariant_subspace_does_not_hide_the_rest():
    matrix = torch.diag(torch.tensor([5.0, 1.0, -3.0], dtype=torch.float64))
    result = lanczos(MatrixOperator(matrix), start=torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64))
    assert (result.largest.item(), result.smallest.item()) == pytest.approx((5.0, -3.0))


@pytest.mark.parametrize("bulk", [0.0, 0.1])
def test_a_start_of_old_eigenvectors_does_not_hide_a_new_one(bulk):
    values = torch.cat([torch.tensor([1.0, -1.0, 10.0]), bulk * torch.rand(997)]).double()
    start = torch.zeros(1000, dtype=torch.float64)
    start[:2] = 1.0
    result = lanczos(MatrixOperator(torch.diag(values)), start=start)
    assert result.converged
    assert (result.largest.item(), result.smallest.item()) == pytest.approx((10.0, -1.0))


def test_a_repeated_eigenvalue_is_found_once():
    values = torch.tensor([3.0, 3.0, 3.0, 2.0, 1.0, 0.5, 0.2, 0.1]).double()
    assert lanczos(MatrixOperator(torch.diag(values)), k=3).largest.tolist() == pytest.approx([3.0, 2.0, 1.0])


@pytest.mark.parametrize("scale", [1e-30, 1e-22, 1e20, 1e30])
def test_squares_of_float32_neither_vanish_nor_overflow(scale):
    matrix = spd_matrix(40, 100.0, signs=True)
    values = torch.linalg.eigvalsh(matrix)
    operator = MatrixOperator((scale * matrix).float())
    ends = [lanczos(operator, rtol=1e-4).largest.item(), power_iteration(operator, which="largest", rtol=1e-2).value]
    assert ends == pytest.approx([scale * float(values[-1])] * 2, rel=1e-3)


def test_global_random_state_is_not_touched():
    before = torch.get_rng_state()
    lanczos(MatrixOperator(torch.eye(4)))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("options", "message"), [({"k": 0}, "got 0"), ({"k": 5}, "<= 4"), ({"k": 3, "max_iterations": 2}, "max_iterations")]
)
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        lanczos(MatrixOperator(torch.eye(4)), **options)


def operator_of(values, seed=0):
    """A dense operator with given eigenvalues, [n], in a random basis."""
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(len(values), len(values), dtype=torch.float64, generator=generator))
    matrix = basis @ torch.diag(values.double()) @ basis.T
    return MatrixOperator((matrix + matrix.T) / 2)


@pytest.fixture(scope="module")
def perceptrons():
    """A perceptron with 2,410 weights on digits, at its start and after training: (operator, dense eigenvalues)."""
    images, labels = digits_data()
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10)).double()
    parameters = list(net.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.5)
    found = []
    for steps in (0, 1000):
        for _ in range(steps):
            optimizer.zero_grad()
            F.cross_entropy(net(images), labels).backward()
            optimizer.step()
        # of a copy, because the operator keeps the graph of these very weights
        copied = copy.deepcopy(net)
        operator = HessianOperator(partial(loss_on, copied, images, labels), list(copied.parameters()))
        assert operator.size == 2410
        dense = operator.to_dense()
        found.append((operator, torch.linalg.eigvalsh((dense + dense.T) / 2)))
    return found


def loss_on(net, images, labels):
    return F.cross_entropy(net(images), labels)


@pytest.mark.parametrize("which", [0, 1], ids=["at the start", "trained"])
def test_the_spectrum_of_a_network_in_sixty_products(perceptrons, which):
    """Ritz values converge with the square of their residual; slowest at the lower end, where many are close."""
    operator, values = perceptrons[which]
    scale = float(values.abs().amax())
    result = lanczos(operator, k=5, max_iterations=60, rtol=1e-6)
    assert torch.allclose(result.largest, values.flip(0)[:5], rtol=0, atol=1e-6 * scale)
    assert result.smallest[0].item() == pytest.approx(values[0].item(), abs=1e-6 * scale)
    assert result.products <= 60
    for found, bounds in ((result.largest, result.largest_bounds), (result.smallest, result.smallest_bounds)):
        assert bool(((found[:, None] - values[None]).abs().amin(1) <= bounds + 1e-12 * scale).all())


def test_eigenvectors_belong_to_their_values(perceptrons):
    operator, _ = perceptrons[1]
    result = lanczos(operator, k=3, max_iterations=60, vectors=True)
    for values, vectors, bounds in (
        (result.largest, result.largest_vectors, result.largest_bounds),
        (result.smallest, result.smallest_vectors, result.smallest_bounds),
    ):
        assert vectors.shape == (3, operator.size)
        assert torch.allclose(vectors @ vectors.T, torch.eye(3, dtype=torch.float64), atol=1e-10)
        for value, vector, bound in zip(values, vectors, bounds, strict=True):
            residual = (operator.matvec(vector) - value * vector).norm()
            assert residual.item() == pytest.approx(bound.item(), rel=1e-3, abs=1e-10)
    assert lanczos(operator, max_iterations=3).largest_vectors is None


def test_lanczos_takes_as_many_products_as_asked():
    operator = MatrixOperator(spd_matrix(50, 1e3))
    assert lanczos(operator, rtol=0.5).products < 7
    assert lanczos(operator, rtol=0.5, min_iterations=7).products == 7


@pytest.mark.parametrize(("which", "expected"), [("magnitude", -2.0), ("largest", 1.5), ("smallest", -2.0)])
@pytest.mark.parametrize("scale", [1e-10, 1.0, 1e10])
def test_power_iteration_finds_the_eigenvalue_that_is_asked_for(which, expected, scale):
    values = scale * torch.cat([torch.tensor([1.5, -2.0]), torch.linspace(-0.5, 0.5, 100)]).double()
    operator = operator_of(values)
    result = power_iteration(operator, which=which, rtol=1e-7, max_iterations=200)
    assert result.converged
    assert result.value == pytest.approx(expected * scale, rel=1e-10)
    residual = float((operator.matvec(result.vector) - result.value * result.vector).norm())
    assert residual == pytest.approx(result.bound, rel=1e-3)
    assert result.bound <= 1e-7 * 2.0 * scale


@pytest.mark.parametrize("values", [[-5.0, -3.0, -1.0], [1.0, 3.0, 5.0], [-5.0, 0.0, 0.1]], ids=str)
def test_power_iteration_finds_both_ends_whatever_their_signs(values):
    operator = operator_of(torch.tensor(values, dtype=torch.float64))
    ends = [power_iteration(operator, which=which, max_iterations=1000).value for which in ("smallest", "largest")]
    assert ends == pytest.approx([values[0], values[-1]], abs=1e-9)


def test_power_iteration_by_magnitude_does_not_pretend_to_settle_a_tie():
    """The question of the forum: the largest eigenvalue of {1.001, −1.002, rest below 0.3}."""
    operator = operator_of(torch.cat([torch.tensor([1.001, -1.002]), torch.linspace(-0.3, 0.3, 200)]))
    assert not power_iteration(operator, rtol=1e-3).converged
    for which, value in (("largest", 1.001), ("smallest", -1.002)):
        result = power_iteration(operator, which=which, rtol=1e-6)
        assert result.converged
        assert result.value == pytest.approx(value, abs=1e-6)


def test_power_iteration_takes_as_many_products_as_asked():
    operator = MatrixOperator(spd_matrix(50, 1e3))
    assert power_iteration(operator, rtol=0.9).products < 7
    assert power_iteration(operator, rtol=0.9, min_iterations=7).products == 7


def test_power_iteration_starts_where_it_is_told():
    matrix = spd_matrix(80, 1e3)
    _, vectors = torch.linalg.eigh(matrix)
    operator = MatrixOperator(matrix)
    assert power_iteration(operator, start=vectors[:, -1], rtol=1e-3).products == 1
    assert power_iteration(operator, start=torch.zeros(80), max_iterations=2).products == 2
    firsts = [
        power_iteration(operator, max_iterations=1, generator=torch.Generator().manual_seed(seed)).value
        for seed in (1, 1, 2)
    ]
    assert firsts[0] == firsts[1] != firsts[2]


@pytest.mark.parametrize("which", [0, 1], ids=["at the start", "trained"])
def test_power_iteration_in_float32_keeps_its_vector_a_unit_vector(perceptrons, which):
    """A bulk of tiny eigenvalues: near convergence the residual is rounding, and not orthogonal to the vector."""
    operator, values = perceptrons[which]
    single = MatrixOperator(operator.to_dense().float())
    for max_iterations in (30, 100, 1000):
        result = power_iteration(single, which="largest", max_iterations=max_iterations, rtol=1e-7)
        assert float(result.vector.norm()) == pytest.approx(1.0, abs=1e-5)
        assert result.value <= float(values[-1]) * (1 + 1e-5)
    assert result.value == pytest.approx(float(values[-1]), rel=1e-5)


def test_power_iteration_on_nothing_and_on_nan():
    assert power_iteration(MatrixOperator(torch.zeros(3, 3))).converged
    operator = MatrixOperator(torch.eye(3))
    operator.matrix = torch.full((3, 3), torch.nan)
    result = power_iteration(operator)
    assert (result.converged, result.products) == (False, 1)
    assert math.isnan(result.value)


SPECTRA = {
    "flat": torch.linspace(-1, 3, 1000),
    "bulk and outliers": torch.cat([0.05 * torch.linspace(-1, 1, 990) ** 3, torch.linspace(1, 5, 10)]),
    "geometric": torch.logspace(-6, 0, 1000),
    "two values": torch.cat([torch.zeros(600), torch.ones(400)]),
}


@pytest.mark.parametrize("name", SPECTRA)
def test_the_density_of_a_known_matrix(name):
    """Wasserstein distance at most 1 % of the range on average, which is what the reported error stands for."""
    values = SPECTRA[name].double().sort().values
    operator = operator_of(values)
    spread = float(values[-1] - values[0])
    distances, reported = [], []
    for seed in range(8):
        density = spectral_density(operator, generator=torch.Generator().manual_seed(seed))
        distances.append(wasserstein_distance(density.eigenvalues, values, density.weights) / spread)
        reported.append(density.error / spread)
        assert float(density.weights.sum()) == pytest.approx(1.0)
    assert mean(distances) <= 0.01
    assert mean(distances) <= mean(reported)


def test_density_stops_when_it_knows_enough():
    operator = operator_of(SPECTRA["flat"])
    coarse, fine = (spectral_density(operator, rtol=rtol, iterations=100) for rtol in (5e-2, 1.3e-2))
    assert coarse.converged
    assert fine.converged
    assert coarse.products < fine.products
    assert coarse.error > fine.error
    few = spectral_density(operator, rtol=1e-4, max_probes=2, iterations=10)
    assert (few.products, few.converged) == (20, False)


def test_density_of_a_multiple_of_the_identity_is_one_point():
    density = spectral_density(MatrixOperator(3.0 * torch.eye(10, dtype=torch.float64)))
    assert density.eigenvalues.unique().tolist() == pytest.approx([3.0])
    assert (density.products, density.converged, density.error) == (1, True, 0.0)


def test_smoothed_density_integrates_to_one():
    density = spectral_density(operator_of(SPECTRA["flat"]))
    points = torch.linspace(-3, 5, 2001)
    assert float(torch.trapezoid(density.smoothed(points, width=0.1), points)) == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("products", [30, 90])
def test_the_error_of_the_trace_is_what_it_is_said_to_be(name, products):
    """The median error of a normal distribution is 0.67 standard errors; with ten samples a little more."""
    values = SPECTRA[name].double()
    operator = operator_of(values)
    errors = []
    for seed in range(100):
        result = trace(operator, products=products, generator=torch.Generator().manual_seed(seed))
        errors.append(abs(result.trace - float(values.sum())) / result.standard_error)
        assert result.products == products
    assert 0.4 < median(errors) < 1.0


def test_dominant_eigenvalues_do_not_blur_the_trace():
    """What Hutch++ is for: outliers of 1e6 beside a bulk of one."""
    values = torch.cat([torch.full((5,), 1e6), torch.ones(995)]).double()
    result = trace(operator_of(values), products=60, rtol=1e-3)
    assert result.trace == pytest.approx(float(values.sum()), rel=1e-6)
    assert result.converged
    assert not trace(operator_of(SPECTRA["flat"]), products=60, rtol=1e-6).converged


def test_density_and_trace_say_when_the_operator_is_not_finite():
    operator = MatrixOperator(torch.eye(100))
    operator.matrix = torch.full((100, 100), torch.nan)
    assert not spectral_density(operator).converged
    assert not trace(operator).converged
    assert not trace(operator, products=100).converged


@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        (power_iteration, {"which": "top"}, "'magnitude', 'largest', 'smallest'"),
        (power_iteration, {"max_iterations": 0}, "max_iterations >= 1"),
        (power_iteration, {"min_iterations": 200}, "min_iterations = 200"),
        (trace, {"products": 5}, "products >= 6"),
        (spectral_density, {"max_probes": 0}, "max_probes >= 1"),
        (spectral_density, {"iterations": 1}, "iterations >= 2"),
        (lanczos, {"min_iterations": 200}, "min_iterations = 200"),
    ],
)
def test_refuses_what_cannot_be_done(function, options, message):
    with pytest.raises(ValueError, match=message):
        function(MatrixOperator(torch.eye(4)), **options)


@pytest.mark.parametrize(("method", "delay"), [("lanczos", 0), ("power_iteration", 10)])
def test_a_tracker_sees_one_eigenvalue_overtake_another(method, delay):
    """Eigenvectors stay as they are, so that the old one knows nothing of the new one."""
    tracker = SpectrumTracker(method, max_iterations=200)
    bulk = torch.linspace(-0.1, 0.1, 300).double()
    overtaken = 0
    for shift in torch.linspace(-0.5, 1.0, 31).tolist():
        values = torch.cat([torch.tensor([1.0 - shift, 1.0 + shift, -0.5]).double(), bulk])
        result = tracker.measure(MatrixOperator(torch.diag(values)))
        overtaken += shift > 0
        if overtaken == 0 or overtaken > delay:
            # the residual is 1 %, and the error of the value at most that, which for power iteration is all one knows
            assert result.largest[0].item() == pytest.approx(1.0 + abs(shift), rel=0.02)
            assert result.smallest[0].item() == pytest.approx(-0.5, abs=0.05)


def test_a_tracker_follows_gradient_descent_with_five_products():
    """2,000 full-batch steps, measured every 20: λ_max to 1 % of a cold and precise measurement, each time."""
    images, labels = digits_data()
    images, labels = (images[:1000] - images[:1000].mean(0)).float(), F.one_hot(labels[:1000], 10).float()
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 50), nn.Tanh(), nn.Linear(50, 50), nn.Tanh(), nn.Linear(50, 10))
    parameters = list(net.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.2)
    warm, products = SpectrumTracker(rtol=1e-2), []

    def loss():
        return (net(images) - labels).square().sum(1).mean() / 2

    for step in range(2000):
        if step % 20 == 0:
            operator = HessianOperator(loss, parameters)
            result = warm.measure(operator)
            assert result.converged
            products.append(result.products)
            if step % 200 == 0:
                exact = lanczos(operator, rtol=1e-5).largest[0].item()
                assert result.largest[0].item() == pytest.approx(exact, rel=1e-2)
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert median(products) <= 5


def test_a_tracker_goes_on_from_its_state():
    operators = [MatrixOperator(spd_matrix(60, 1e3) * scale) for scale in (1.0, 1.1, 1.2)]
    whole, first, second = SpectrumTracker(), SpectrumTracker(), SpectrumTracker()
    wanted = [whole.measure(operator).largest for operator in operators]
    first.measure(operators[0])
    second.load_state_dict(first.state_dict())
    assert [second.measure(operator).largest for operator in operators[1:]] == wanted[1:]


def test_a_tracker_survives_a_change_of_size_and_a_nan():
    tracker = SpectrumTracker()
    for size in (5, 7):
        assert tracker.measure(MatrixOperator(torch.eye(size))).largest.item() == pytest.approx(1.0)
    broken = MatrixOperator(torch.eye(7))
    broken.matrix = torch.full((7, 7), torch.nan)
    assert bool(tracker.measure(broken).largest.isnan())
    assert tracker.measure(MatrixOperator(2 * torch.eye(7))).largest.item() == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "lobpcg"}, "method to be one of"),
        ({"k": 0}, "k to be an integer >= 1"),
        ({"k": 1.5}, "k to be an integer"),
        ({"method": "power_iteration", "k": 2}, "power iteration finds one eigenvalue"),
        ({"max_iterations": 1}, "max_iterations to be an integer >= 2"),
        ({"rtol": 0.0}, "0 < rtol"),
        ({"rtol": float("nan")}, "0 < rtol"),
    ],
)
def test_a_tracker_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        SpectrumTracker(**options)
