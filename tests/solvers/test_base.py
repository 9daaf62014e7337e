"""All solvers on matrices with known solutions, and what they say when there is none."""

import math
from dataclasses import replace

import pytest
import torch

from lightning_ifthpo.curvature import MatrixOperator
from lightning_ifthpo.optimizers.update_rule import UpdateRule
from lightning_ifthpo.solvers import (
    Amortized,
    ConjugateGradient,
    Direct,
    Identity,
    MinimumResidual,
    Neumann,
    Nystrom,
    Status,
)
from lightning_ifthpo.solvers.base import status_without_tolerance
from tests.checks import (
    check_refuses_other_shapes,
    check_reports_a_status_never_nan,
    check_result_is_honest,
    check_solves,
    check_takes_zero_to_zero,
)
from tests.helpers.device import DEVICE, DTYPE, WHERE, ByReciprocals, within
from tests.helpers.implementations import SOLVERS, SOLVING
from tests.helpers.problems import low_rank, relative_error, spd_matrix
from tests.helpers.systems import right_hand_side

# beyond that sixty iterations do not reach a residual of rounding
CONDITIONS = [condition for condition in (1.0, 1e2, 1e4) if condition * torch.finfo(DTYPE).eps < 1e-4]

LOOKING = [solver for solver in SOLVERS if not isinstance(solver, Identity)]  # which takes no product


@pytest.mark.parametrize("solver", SOLVING, ids=repr)
@pytest.mark.parametrize("condition", CONDITIONS)
def test_solves_a_positive_definite_system(solver, condition):
    # rounding of a Krylov method: condition · eps, with a margin for 60 recursions
    check_solves(solver, spd_matrix(20, condition), right_hand_side(20), within(1e-13) * condition)


@pytest.mark.parametrize("solver", [MinimumResidual(max_iterations=60), Direct()], ids=repr)
def test_solves_an_indefinite_system(solver):
    check_solves(solver, spd_matrix(20, 1e2, signs=True), right_hand_side(20), within(1e-10))


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_reports_products_and_the_true_residual(solver):
    check_result_is_honest(solver, spd_matrix(12, 50.0), right_hand_side(12))


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_zero_right_hand_side_gives_zero(solver):
    check_takes_zero_to_zero(solver, spd_matrix(5, 10.0))


@pytest.mark.parametrize(
    ("solver", "where"), [*((s, "operator") for s in LOOKING), *((s, "right-hand side") for s in SOLVERS)], ids=repr
)
def test_nan_ends_in_a_status_and_a_finite_vector(solver, where):
    matrix, b = spd_matrix(6, 10.0), right_hand_side(6)
    if where == "operator":
        matrix = torch.full_like(matrix, torch.nan)
    else:
        b[2] = torch.nan
    check_reports_a_status_never_nan(solver, matrix, b)


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_shapes_are_checked(solver):
    check_refuses_other_shapes(solver, torch.eye(3, device=DEVICE))


@pytest.mark.parametrize("solver", [s for s in SOLVING if "Nystrom" not in repr(s)], ids=repr)
def test_a_multiple_of_the_identity_is_solved_in_one_product_and_not_by_zero(solver):
    operator = MatrixOperator(3.0 * torch.eye(7, **WHERE))
    b = right_hand_side(7)
    result = solver.solve(operator, b)
    assert relative_error(result.x, b / 3) < within(1e-14)
    assert result.status is Status.CONVERGED
    assert result.products == (7 if isinstance(solver, Direct) else 1)


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_a_right_hand_side_longer_than_the_largest_number_is_not_finite(solver):
    """Training that diverges passes through such gradients: each entry is finite, and the length is not."""
    b = torch.full((8,), 0.9 * torch.finfo(torch.float32).max)
    result = solver.solve(MatrixOperator(spd_matrix(8, 5.0, dtype=torch.float32)), b)
    assert result.status is Status.NONFINITE
    assert not bool(result.x.any())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("b_scale", [1e-30, 1e-10, 1e10, 1e30])
@pytest.mark.parametrize("a_scale", [1e-10, 1e10])
@pytest.mark.parametrize("solver", [*SOLVING, Neumann(terms=400), Amortized(products=60, horizon=10**6)], ids=repr)
def test_scale_does_not_matter(solver, a_scale, b_scale, dtype):
    if b_scale / a_scale > 1e36 and dtype == torch.float32:
        b_scale = 1e20  # the solution itself must fit
    matrix, b = a_scale * spd_matrix(8, 5.0, dtype=torch.float64), right_hand_side(8, torch.float64)
    result = solver.solve(MatrixOperator(matrix.to(dtype)), (b_scale * b).to(dtype))
    wanted = b_scale * torch.linalg.solve(matrix, b)
    assert relative_error(result.x.double() / b_scale, wanted / b_scale) < 1e-4
    assert result.status.succeeded


@pytest.mark.parametrize("tiny", ["solution", "right-hand side"])
@pytest.mark.parametrize("solver", [*SOLVING, Neumann(terms=400), Amortized(products=60, horizon=10**6)], ids=repr)
def test_denormal_numbers_are_solved_for_where_division_is_by_the_reciprocal(solver, tiny):
    """A length of 1e-40 in float32, whose reciprocal overflows."""
    scales = {"solution": (1e10, 1e-30), "right-hand side": (1e-10, 1e-40)}[tiny]
    matrix, b = scales[0] * spd_matrix(8, 5.0, dtype=torch.float32), scales[1] * right_hand_side(8, torch.float32)
    wanted = torch.linalg.solve(matrix.double(), b.double())
    with ByReciprocals():
        result = solver.solve(MatrixOperator(matrix), b)
    assert relative_error(result.x.double(), wanted) < 1e-4  # the smallest denormal number is 1e-45, 1e-5 of them
    assert result.status.succeeded


@pytest.mark.parametrize("solver", SOLVING, ids=repr)
def test_singular_and_consistent_gives_the_shortest_solution(solver):
    matrix = spd_matrix(10, 100.0)
    values, vectors = torch.linalg.eigh(matrix)
    values[:3] = 0.0
    matrix = vectors @ torch.diag(values) @ vectors.T
    matrix = (matrix + matrix.T) / 2
    b = matrix @ right_hand_side(10)
    result = solver.solve(MatrixOperator(matrix), b)
    assert relative_error(result.x, torch.linalg.pinv(matrix, hermitian=True) @ b) < within(1e-9)
    assert result.status is Status.CONVERGED


@pytest.mark.parametrize(
    ("solver", "status"),
    [
        (ConjugateGradient(max_iterations=60, rtol=1e-6), Status.MAX_ITERATIONS),
        (MinimumResidual(max_iterations=60, rtol=1e-6), Status.MAX_ITERATIONS),
        (Direct(), Status.COMPLETE),
    ],
    ids=lambda value: getattr(value, "name", repr(value)),
)
def test_singular_and_inconsistent_leaves_a_residual_and_says_so(solver, status):
    matrix, b = torch.diag(torch.tensor([0.0, 1.0, 2.0], **WHERE)), torch.ones(3, **WHERE)
    result = solver.solve(MatrixOperator(matrix), b)
    assert result.status is status
    assert result.relative_residual >= 1 / math.sqrt(3) - within(1e-12)
    assert result.x.abs().max() < 1e3


@pytest.mark.parametrize("solver", [s for s in LOOKING if not isinstance(s, Direct)], ids=repr)
def test_negative_curvature_has_a_status_or_a_solution(solver):
    matrix, b = spd_matrix(12, 50.0, signs=True), right_hand_side(12)
    result = solver.solve(MatrixOperator(matrix), b)
    if isinstance(solver, MinimumResidual):
        assert result.status.succeeded
    elif isinstance(solver, Amortized):
        for _ in range(3):  # the first estimate may still lie where the curvature is positive
            result = solver.solve(MatrixOperator(matrix), b, result.x)
        assert result.status is Status.NEGATIVE_CURVATURE
    elif solver == Neumann(terms=5, step_size=0.01):
        assert result.status in (Status.NEGATIVE_CURVATURE, Status.DIVERGED)
    else:
        assert result.status is Status.NEGATIVE_CURVATURE
    assert bool(torch.isfinite(result.x).all())


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_damping_is_that_of_the_damped_matrix(solver):
    matrix, b = spd_matrix(6, 10.0), right_hand_side(6)
    if isinstance(solver, Amortized):
        solver = replace(solver, rule=UpdateRule(step_size=0.05))  # without one it measures its step on the bare matrix
    damped = replace(solver, damping=2.0).solve(MatrixOperator(matrix), b)
    shifted = replace(solver, damping=0.0).solve(MatrixOperator(matrix + 2.0 * torch.eye(6, **WHERE)), b)
    assert relative_error(damped.x, shifted.x) < within(1e-12)
    if not isinstance(solver, Identity):
        assert damped.relative_residual == pytest.approx(
            shifted.relative_residual, rel=within(1e-6, power=0.5), abs=within(1e-12)
        )


def test_a_start_that_dwarfs_the_solution_is_dropped_before_it_overflows():
    b = torch.full((4,), 1e-30, device=DEVICE)
    for solver in (ConjugateGradient(), Amortized()):
        result = solver.solve(MatrixOperator(torch.eye(4, device=DEVICE)), b, torch.ones(4, device=DEVICE))
        assert result.status.succeeded
        assert result.x.abs().max() < 1e-28


def test_damping_by_horizon_needs_an_optimizer_and_takes_its_step():
    solver, operator = ConjugateGradient(damping="horizon", horizon=50), MatrixOperator(spd_matrix(4, 3.0))
    with pytest.raises(ValueError, match="needs the inner optimizer"):
        solver.solve(operator, torch.ones(4, **WHERE))
    assert solver.with_optimizer(UpdateRule(step_size=1.0)).system(operator).damping == pytest.approx(1 / 50)
    solver = ConjugateGradient(damping=0.3)
    assert solver.with_optimizer(UpdateRule(step_size=0.1)).system(operator).damping == 0.3
    assert solver.with_optimizer(UpdateRule(step_size=0.1, decay=0.5)).system(operator).damping == 0.8


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ConjugateGradient(damping=torch.tensor([1.0, -5.0], device=DEVICE)), "damping >= 0"),
        (lambda: ConjugateGradient(damping=-1.0), "damping >= 0 or 'horizon', got -1.0"),
        (lambda: MinimumResidual(damping=math.nan), "damping >= 0"),
        (lambda: MinimumResidual(damping="auto"), "'horizon', got 'auto'"),
    ],
)
def test_options_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_horizon_is_at_least_one_step():
    with pytest.raises(ValueError, match="horizon to be an integer >= 1, got 0"):
        ConjugateGradient(horizon=0)


def test_a_repr_shows_the_options_and_not_the_optimizer():
    solver = Direct(damping=0.5)
    assert repr(solver.with_optimizer(UpdateRule(0.1))) == repr(solver)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_without_a_tolerance_only_rounding_counts_as_converged(dtype):
    """A residual of √eps is the limit."""
    root = torch.finfo(dtype).eps ** 0.5
    assert status_without_tolerance(0.5 * root, dtype) is Status.CONVERGED
    assert status_without_tolerance(2.0 * root, dtype) is Status.COMPLETE


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_the_start_is_taken_in_the_units_of_the_solution(size):
    """A start at the solution is left as it is, whatever the size of the right-hand side."""
    matrix, b = spd_matrix(6, 10.0), size * right_hand_side(6)
    x = torch.linalg.solve(matrix, b)
    for solver in (ConjugateGradient(rtol=1e-3), MinimumResidual(rtol=1e-3)):
        result = solver.solve(MatrixOperator(matrix), b, x)
        assert relative_error(result.x, x) < within(1e-13)
        assert (result.status, result.products) == (Status.CONVERGED, 1)


RULE = UpdateRule(step_size=0.02, decay=0.5)


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_the_horizon_and_the_decay_of_the_optimizer_are_damping(solver):
    """1 / (0.02 · 50) + 0.5 = 1.5."""
    matrix, b = spd_matrix(6, 10.0), right_hand_side(6)
    assert replace(solver, damping="horizon").needs_optimizer
    by_rule = replace(solver, damping="horizon", horizon=50).with_optimizer(RULE).solve(MatrixOperator(matrix), b)
    rule = UpdateRule(RULE.step_size) if isinstance(solver, Amortized) else None  # without one it measures its step
    by_number = replace(solver, damping=1.5, horizon=50, rule=rule).solve(MatrixOperator(matrix), b)
    assert relative_error(by_rule.x, by_number.x) < within(1e-12)
    undamped = replace(solver, damping=0.0, horizon=50, rule=rule).solve(MatrixOperator(matrix), b)
    if not isinstance(solver, Identity):
        residual = pytest.approx(by_number.relative_residual, rel=1e-6, abs=within(1e-12))
        assert by_rule.relative_residual == residual
        assert relative_error(by_rule.x, undamped.x) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("consistent", [True, False], ids=["consistent", "inconsistent"])
@pytest.mark.parametrize(
    "solver",
    [s for s in SOLVERS if s.damping == 0.0 and not isinstance(s, Nystrom)]
    + [Neumann(terms=200, step_size=0.5), Amortized(), Nystrom(rank=5, damping=1e-3), Nystrom(rank=200)],
    ids=repr,
)
def test_a_semi_definite_matrix_is_not_called_indefinite(solver, consistent, dtype):
    """Its zero eigenvalues are rounding of products with Jᵀ and J, of either sign."""
    for seed in range(30):
        operator, _, b = low_rank(seed, dtype, signs=False, consistent=consistent)
        x = None
        for _ in range(4 if isinstance(solver, Amortized) else 1):
            result = solver.solve(operator, b, x)
            x = result.x
            assert result.status not in (Status.NEGATIVE_CURVATURE, Status.DIVERGED, Status.NONFINITE)


@pytest.mark.parametrize("size", [1e-3, 1e-1])
def test_the_sign_of_the_undamped_matrix_does_not_matter(size):
    """Damping of one lifts eigenvalues of −size; beyond it the status tells."""
    matrix, b = spd_matrix(12, 50.0, dtype=torch.float64), right_hand_side(12, torch.float64)
    matrix = matrix - (1.0 + size) * torch.eye(12, device=DEVICE)
    for solver in (ConjugateGradient(max_iterations=60), Nystrom(rank=12), Nystrom(rank=11), Neumann()):
        assert replace(solver, damping=1.0).solve(MatrixOperator(matrix), b).status.succeeded
        assert replace(solver, damping=1e-4 * size).solve(MatrixOperator(matrix), b).status in (
            Status.NEGATIVE_CURVATURE,
            Status.COMPLETE,  # Nyström below full rank may not see it, and its residual says so
            Status.CONVERGED,  # at full rank it has solved the system
        )


class _Overflowing(MatrixOperator):
    """Has entries so large that its products are not finite."""

    def _product(self, v):
        return self.matrix @ v * 1e300 * 1e300


@pytest.mark.parametrize("solver", LOOKING, ids=repr)
def test_no_success_has_a_residual_that_is_not_finite(solver):
    operator = _Overflowing(torch.eye(3, device=DEVICE))
    result = solver.solve(operator, torch.ones(3, device=DEVICE))
    assert result.status is Status.NONFINITE
    assert math.isnan(result.relative_residual)
    assert not bool(result.x.any())


def test_a_solution_that_overflows_in_the_units_of_b_is_not_returned():
    operator = MatrixOperator(1e-20 * torch.eye(3, dtype=torch.float32, device=DEVICE))
    for solver in (ConjugateGradient(), MinimumResidual(), Direct()):
        result = solver.solve(operator, torch.full((3,), 1e30, device=DEVICE))
        assert result.status is Status.NONFINITE
        assert not bool(result.x.any())
