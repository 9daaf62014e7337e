"""Conjugate gradients and minimum residual."""

import itertools
import math
from random import Random

import pytest
import torch
from scipy.sparse.linalg import minres

from lightning_ifthpo.curvature import CurvatureOperator, MatrixOperator
from lightning_ifthpo.solvers import (
    ConjugateGradient,
    MinimumResidual,
    Nystrom,
    Status,
)
from tests.helpers.device import DEVICE, FLOAT64, randn
from tests.helpers.problems import REAL, low_rank, real_curvature, relative_error, spd_matrix
from tests.helpers.systems import Counted, right_hand_side


@pytest.mark.parametrize("solver", [ConjugateGradient(max_iterations=1), MinimumResidual(max_iterations=1)], ids=repr)
def test_a_warm_start_is_used(solver):
    matrix, b = spd_matrix(12, 50.0), right_hand_side(12)
    near = torch.linalg.solve(matrix, b) + 1e-3 * right_hand_side(12)
    cold = solver.solve(MatrixOperator(matrix), b)
    warm = solver.solve(MatrixOperator(matrix), b, near)
    assert warm.relative_residual < 0.05 * cold.relative_residual
    assert warm.products == cold.products + 1


@pytest.mark.parametrize("family", [ConjugateGradient, MinimumResidual])
@pytest.mark.parametrize("condition", [1e4, 1e6])
def test_the_residual_is_the_true_one_after_a_long_recursion_in_float32(family, condition):
    matrix, b = spd_matrix(200, condition, dtype=torch.float32), right_hand_side(200, torch.float32)
    result = family(max_iterations=3000, rtol=1e-5).solve(MatrixOperator(matrix), b)
    image = matrix.double() @ result.x.double()
    true, rounding = (float((vector.double() - image).norm() / b.norm()) for vector in (b, matrix @ result.x))
    # the product that measures the residual is rounded itself, in all directions
    assert result.relative_residual == pytest.approx(math.hypot(true, rounding), rel=0.1)
    assert (result.status is Status.CONVERGED) == (result.relative_residual <= 1e-5)


def test_tolerance_ends_the_iteration_and_is_kept():
    operator, b = MatrixOperator(spd_matrix(30, 1e3, dtype=torch.float64)), right_hand_side(30, torch.float64)
    for family in (ConjugateGradient, MinimumResidual):
        loose, tight = (family(max_iterations=500, rtol=rtol).solve(operator, b) for rtol in (1e-2, 1e-8))
        assert loose.relative_residual <= 1e-2
        assert tight.relative_residual <= 1e-8
        assert loose.products < tight.products
        few = family(max_iterations=3, rtol=1e-8).solve(operator, b)
        assert (few.status, few.products) == (Status.MAX_ITERATIONS, 3)
        assert family(max_iterations=3).solve(operator, b).status is Status.COMPLETE


@pytest.mark.parametrize("damping", [0.0, 1e-3])
def test_a_preconditioner_pays_where_few_eigenvalues_stand_out(damping):
    """Sixty large ones, geometrically spaced, and 240 at one."""
    values = torch.cat([torch.logspace(2, 6, 60, **FLOAT64), torch.ones(240, **FLOAT64)])
    basis = torch.linalg.qr(randn(300, 300, seed=5, dtype=torch.float64)).Q
    matrix, b = basis @ torch.diag(values) @ basis.T, right_hand_side(300, torch.float64)
    operator = MatrixOperator((matrix + matrix.T) / 2)
    options = {"max_iterations": 500, "rtol": 1e-8, "damping": damping}
    plain = ConjugateGradient(**options).solve(operator, b)
    conditioned = ConjugateGradient(preconditioner=Nystrom(rank=80), **options).solve(operator, b)
    assert plain.status is conditioned.status is Status.CONVERGED
    assert conditioned.products < 100 < plain.products
    assert relative_error(conditioned.x, plain.x) < 1e-4


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ConjugateGradient(preconditioner=Nystrom(damping=1.0)), "takes the damping of the solver"),
        (lambda: ConjugateGradient(max_iterations=0), "max_iterations to be an integer >= 1"),
        (lambda: ConjugateGradient(rtol=1.5), "0 <= rtol < 1"),
    ],
)
def test_options_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("family", [ConjugateGradient, MinimumResidual])
def test_the_residual_is_measured_by_one_product(family):
    operator, b = MatrixOperator(spd_matrix(40, 1e3, dtype=torch.float64)), right_hand_side(40, torch.float64)
    results = [family(max_iterations=iterations).solve(operator, b) for iterations in (1, 20, 21)]
    assert [(result.products, result.extra_products) for result in results] == [(1, 1), (20, 1), (21, 1)]


def test_the_products_of_a_preconditioner_count():
    operator, b = MatrixOperator(spd_matrix(40, 1e3, dtype=torch.float64)), right_hand_side(40, torch.float64)
    assert ConjugateGradient(max_iterations=2, preconditioner=Nystrom(rank=5)).solve(operator, b).products == 7


@pytest.mark.parametrize("values", [[0.0, 1.0, 2.0], [0.0, 1.0, 2.0, 3.0], [0.0, 0.0, 3.0, 4.0]], ids=str)
def test_minimum_residual_on_a_singular_system_ends_where_only_rounding_is_left(values):
    matrix = torch.diag(torch.tensor(values, **FLOAT64))
    b = torch.ones(len(values), **FLOAT64)
    result = MinimumResidual(max_iterations=20).solve(MatrixOperator(matrix), b)
    assert result.status is Status.COMPLETE
    assert result.products <= len(values)
    assert result.relative_residual == pytest.approx((values.count(0.0) / len(values)) ** 0.5, rel=1e-9)
    assert float(result.x.norm()) < 3.0


def test_minimum_residual_of_a_nan_is_not_finite():
    operator = MatrixOperator(torch.eye(3, **FLOAT64))
    operator.matrix = torch.full((3, 3), torch.nan, **FLOAT64)
    result = MinimumResidual().solve(operator, torch.ones(3, **FLOAT64))
    assert (result.status, result.products) == (Status.NONFINITE, 1)


# What CONVERGED means

FAMILIES = [ConjugateGradient, MinimumResidual, lambda **o: ConjugateGradient(preconditioner=Nystrom(rank=2), **o)]


def true_residual(operator: CurvatureOperator, x, b):
    """In float64, with the entries that the operator has."""
    matrix = operator.to_dense().double()
    return float((matrix @ x.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("family", FAMILIES, ids=["CG", "MINRES", "preconditioned CG"])
@pytest.mark.parametrize("rtol", [1e-2, 1e-4])
def test_converged_is_converged_in_float32_on_three_weights(family, rtol):
    """Eigenvalues 1, 10⁻ᵃ, 10⁻ᵇ: the recursion of MINRES claims 8e-5 where the residual is 146."""
    basis = torch.linalg.qr(torch.tensor([[1.0, 2, 3], [4, 5, 6], [7, 8, 10]], **FLOAT64)).Q
    statuses = []
    for first, second in ((a, b) for a in range(1, 8) for b in range(a, 8)):
        values = torch.tensor([1.0, 10.0**-first, 10.0**-second], **FLOAT64)
        matrix = (basis @ torch.diag(values) @ basis.T).float()
        operator, b = MatrixOperator((matrix + matrix.T) / 2), torch.ones(3, device=DEVICE)
        result = family(max_iterations=20, rtol=rtol).solve(operator, b)
        statuses.append(result.status)
        if result.status is Status.CONVERGED:
            # rounding of the measuring product is some eps · ‖x‖, a few percent to all of the tolerance
            assert true_residual(operator, result.x, b) <= 3.0 * rtol
    assert Status.CONVERGED in statuses
    assert Status.NEGATIVE_CURVATURE not in statuses


@pytest.mark.parametrize("family", FAMILIES, ids=["CG", "MINRES", "preconditioned CG"])
@pytest.mark.parametrize("length", [1.0, 1e3, 1e6, 1e8, 1e11])
@pytest.mark.parametrize("size", [1, 5])
def test_a_long_start_does_no_harm_in_float32(family, length, size):
    matrix, b = 3.0 * torch.eye(size, device=DEVICE), torch.ones(size, device=DEVICE)
    solver = family(max_iterations=5, rtol=1e-6)
    result = solver.solve(MatrixOperator(matrix), b, length * torch.ones(size, device=DEVICE))
    assert result.status is Status.CONVERGED
    assert torch.allclose(result.x, b / 3.0, rtol=1e-6)


def test_a_start_that_is_worse_than_zero_is_dropped():
    matrix, b = spd_matrix(12, 50.0, dtype=torch.float64), right_hand_side(12, torch.float64)
    for family in (ConjugateGradient, MinimumResidual):
        cold = family(max_iterations=3).solve(MatrixOperator(matrix), b)
        worse = family(max_iterations=3).solve(MatrixOperator(matrix), b, -b)
        assert torch.equal(cold.x, worse.x)
        assert worse.products == cold.products + 1


class Slipping(Counted):
    """Its third product is wrong by one part in a million."""

    def matvec(self, v):
        image = super().matvec(v)
        return image * (1.0 + 1e-6) if self.count == 3 else image


@pytest.mark.parametrize("family", FAMILIES[:2], ids=["CG", "MINRES"])
@pytest.mark.parametrize("condition", [1e1, 1e2, 1e3, 1e4])
def test_a_recursion_that_drifted_goes_on_from_the_true_residual(family, condition):
    """It claims the tolerance too early, and reaches it in a second run: one product more for each.

    The drift is made, because that of rounding depends on the order in which a device adds.
    """
    matrix, b = spd_matrix(20, condition, dtype=torch.float64), right_hand_side(20, torch.float64)
    operator = Slipping(matrix)
    result = family(max_iterations=400, rtol=1e-11).solve(operator, b)
    assert result.status is Status.CONVERGED
    assert result.extra_products == 2
    assert operator.count == result.products + 2
    assert true_residual(MatrixOperator(matrix), result.x, b) <= 3e-11  # with the rounding of both products


@pytest.mark.parametrize("family", FAMILIES[:2], ids=["CG", "MINRES"])
def test_converged_is_a_residual_below_the_tolerance_where_rounding_makes_a_recursion_drift(family):
    for condition in torch.logspace(3, 7, 20).tolist():
        matrix, b = spd_matrix(20, condition, dtype=torch.float64), right_hand_side(20, torch.float64)
        result = family(max_iterations=400, rtol=1e-11).solve(MatrixOperator(matrix), b)
        assert (result.status is Status.CONVERGED) == (result.relative_residual <= 1e-11)


@pytest.mark.slow
@pytest.mark.parametrize("problem", REAL, ids=str)
def test_converged_is_converged_on_real_problems_in_float32(problem):
    """Hessians and Gauss–Newton matrices of small models on real data, at a tolerance of 1e-2 … 1e-5."""
    operator, b = real_curvature(*problem)
    statuses = []
    for damping in (0.0, 1e-3, 1e-1):
        matrix = MatrixOperator((operator + damping * torch.eye(len(b), device=DEVICE)).float())
        for family in FAMILIES:
            for rtol in (1e-2, 1e-3, 1e-4, 1e-5):
                for iterations in (10, 100):
                    result = family(max_iterations=iterations, rtol=rtol).solve(matrix, b)
                    statuses.append(result.status)
                    if result.status is Status.CONVERGED:
                        assert true_residual(matrix, result.x, b) <= 3.0 * rtol
                    if problem.curvature == "gauss_newton":
                        assert result.status is not Status.NEGATIVE_CURVATURE
    assert Status.CONVERGED in statuses


# Positive definite and ill conditioned


@pytest.mark.parametrize("exponent", [3, 4, 6, 8])
@pytest.mark.parametrize("iterations", [5, 20, 21, 40, 60, 200])
def test_conjugate_gradients_on_a_definite_matrix_do_not_diverge(exponent, iterations):
    """The residual grows, while the error in the norm of A falls."""
    matrix, b = spd_matrix(80, 10.0**exponent, dtype=torch.float64), right_hand_side(80, torch.float64)
    x = torch.linalg.solve(matrix, b)
    results = [
        ConjugateGradient(max_iterations=iterations, rtol=rtol).solve(MatrixOperator(matrix), b)
        for rtol in (None, 1e-6)
    ]
    assert results[0].status in (Status.COMPLETE, Status.CONVERGED)
    assert results[1].status in (Status.MAX_ITERATIONS, Status.CONVERGED)
    for result in results:
        error = result.x - x
        assert error @ matrix @ error <= x @ matrix @ x


def test_indefinite_where_the_first_curvature_is_zero():
    """Half of the directions curve up, half down: pᵀAp = 0 although Ap is long."""
    operator = MatrixOperator(torch.diag(torch.tensor([2.0, -2.0], **FLOAT64)))
    result = ConjugateGradient().solve(operator, torch.ones(2, **FLOAT64))
    assert (result.status, result.products) == (Status.NEGATIVE_CURVATURE, 1)


# Singular


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("consistent", [True, False], ids=["consistent", "inconsistent"])
@pytest.mark.parametrize("signs", [False, True], ids=["semi-definite", "indefinite"])
def test_minimum_residual_ends_at_the_shortest_least_squares_solution(signs, consistent, dtype):
    """Eighty random matrices of rank r of n, by products with Jᵀ and J."""
    eps = torch.finfo(dtype).eps
    for seed in range(40):
        operator, matrix, b = low_rank(seed, dtype, signs=signs, consistent=consistent)
        wanted = torch.linalg.pinv(matrix, hermitian=True, rtol=eps**0.5) @ b.double()
        least = float((matrix @ wanted - b.double()).norm() / b.double().norm())
        result = MinimumResidual(max_iterations=4 * len(b)).solve(operator, b)
        # eps^⅔ is where a direction counts as null; without its part, x is good to the square root of that
        assert result.relative_residual <= least + eps ** (2 / 3)
        assert relative_error(result.x.double(), wanted) <= 2.0 * eps ** (1 / 3)
        assert result.status is (Status.CONVERGED if consistent else Status.COMPLETE)
        if dtype is torch.float64:  # no further from it than another library, whose x may be 1e14 long
            other, _ = minres(matrix.cpu().numpy(), b.cpu().numpy(), rtol=1e-8, maxiter=4 * len(b))
            theirs = (matrix.cpu() @ torch.from_numpy(other) - b.cpu()).norm() / b.cpu().norm()
            assert abs(result.relative_residual - least) <= abs(float(theirs) - least) + eps ** (2 / 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("warm", [False, True], ids=["from zero", "from a start"])
def test_the_residual_of_minimum_residual_never_grows_with_more_iterations(warm, dtype):
    for seed in range(12):
        operator, _, b = low_rank(seed, dtype, signs=seed % 2 == 1, consistent=False)
        start = 0.01 * b if warm else None
        lengths = [b.norm().item() if start is None else float((operator.matvec(start) - b).norm())]
        lengths[0] = min(1.0, lengths[0] / float(b.norm()))
        for iterations in (1, 2, 3, 5, 8, 13, 20, 21, 50, 200, 1000):
            result = MinimumResidual(max_iterations=iterations).solve(operator, b, start)
            lengths.append(result.relative_residual)
            # b has length one, so that x is as long as the smallest eigenvalue, a tenth, allows
            assert float(result.x.norm() / b.norm()) < 1e3
        # eps^⅔: the share of a null vector that its part in x may add
        assert all(
            later <= earlier + torch.finfo(dtype).eps ** (2 / 3) for earlier, later in itertools.pairwise(lengths)
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("consistent", [True, False], ids=["consistent", "inconsistent"])
@pytest.mark.parametrize("family", [FAMILIES[0], FAMILIES[2]], ids=["CG", "preconditioned CG"])
def test_conjugate_gradients_do_not_call_a_semi_definite_matrix_indefinite(family, consistent, dtype):
    for seed in range(40):
        operator, _, b = low_rank(seed, dtype, signs=False, consistent=consistent)
        result = family(max_iterations=4 * len(b), rtol=1e-3).solve(operator, b)
        assert result.status is (Status.CONVERGED if consistent else Status.MAX_ITERATIONS)
        assert result.relative_residual <= 1.0 + 1e-6  # a solution does not exist, and nothing worse than zero is said
        assert math.isfinite(float(result.x.norm()))


@pytest.mark.slow
def test_the_status_of_any_system_is_honest():
    """Random matrices of every sign, condition, unit, damping and start, in both precisions."""
    random = Random(0)
    generator = torch.Generator().manual_seed(0)
    statuses = set()
    for _ in range(2000):
        size, dtype = random.choice([1, 2, 3, 5, 10, 30]), random.choice([torch.float32, torch.float64])
        kind = random.choice(["definite", "semi-definite", "indefinite"])
        basis = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator)).Q
        decades = random.uniform(0, 9) * torch.rand(size, dtype=torch.float64, generator=generator)
        values = 10.0 ** (random.uniform(-6, 6) - decades)
        if kind == "semi-definite":
            values[: max(1, size // 3)] = 0.0
        if kind == "indefinite":
            values *= torch.randn(size, dtype=torch.float64, generator=generator).sign()
        matrix = (basis * values) @ basis.T
        matrix = ((matrix + matrix.T) / 2).to(DEVICE, dtype)
        vectors = torch.randn(2, size, dtype=torch.float64, generator=generator).to(DEVICE)
        b = (10.0 ** random.uniform(-6, 6) * vectors[0]).to(dtype)
        b = matrix @ b if random.random() < 0.3 else b
        start = random.choice([None, (10.0 ** random.uniform(-8, 10) * vectors[1]).to(dtype)])
        options = {
            "rtol": random.choice([None, 1e-1, 1e-3, 1e-4, 1e-6]),
            "max_iterations": random.choice([1, 3, 10, 50, 200]),
            "damping": random.choice([0.0, float(values.abs().max()) * 10.0 ** random.uniform(-5, 0)]),
        }
        solver = random.choice(FAMILIES)(**options)
        result = solver.solve(MatrixOperator(matrix), b, start)
        statuses.add(result.status)
        damped = MatrixOperator(matrix.double()).damped(options["damping"])
        true = true_residual(damped, result.x, b) if bool(b.any()) else 0.0
        assert not result.status.succeeded or math.isfinite(result.relative_residual)
        if result.status is Status.CONVERGED:
            assert true <= 3.0 * (torch.finfo(dtype).eps ** 0.5 if options["rtol"] is None else options["rtol"])
        if isinstance(solver, ConjugateGradient) and kind != "indefinite":
            assert result.status is not Status.NEGATIVE_CURVATURE
        assert result.status not in (Status.DIVERGED, Status.NONFINITE)
        if isinstance(solver, MinimumResidual):
            assert true <= 1.0 + torch.finfo(dtype).eps ** (2 / 3)
    assert len(statuses) == 4
