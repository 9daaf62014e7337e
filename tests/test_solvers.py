"""All solvers on matrices with known solutions, and what they say when there is none."""

import math

import pytest
import torch

from lightning_ifthpo.curvature import MatrixOperator
from lightning_ifthpo.optimizers.update_rule import UpdateRule
from lightning_ifthpo.solvers import (
    LinearSystem,
    Amortized,
    ConjugateGradient,
    Direct,
    Identity,
    MinimumResidual,
    Neumann,
    Nystrom,
    Status,
)
from lightning_ifthpo.solvers.diagnosis import diagnose
from tests.problems import relative_error, spd_matrix


class Counted(MatrixOperator):
    """Counts its products."""

    count = 0

    def _product(self, v):
        self.count += 1
        return super()._product(v)


ALL = [
    Identity(),
    Neumann(terms=5),
    Neumann(terms=5, step_size=0.01),
    ConjugateGradient(),
    ConjugateGradient(rtol=1e-3),
    MinimumResidual(),
    ConjugateGradient(preconditioner=Nystrom(rank=3)),
    Direct(),
    Nystrom(rank=60),
    Amortized(),
]
SOLVING = [
    ConjugateGradient(max_iterations=60),
    ConjugateGradient(max_iterations=60, preconditioner=Nystrom(rank=5)),
    MinimumResidual(max_iterations=60),
    Direct(),
    Nystrom(rank=60),
]


def named(solver):
    return repr(solver)


def right_hand_side(size, dtype=torch.float64):
    return torch.randn(size, dtype=dtype, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("solver", SOLVING, ids=named)
@pytest.mark.parametrize("condition", [1.0, 1e2, 1e4])
def test_solves_a_positive_definite_system(solver, condition):
    matrix, b = spd_matrix(20, condition), right_hand_side(20)
    result = solver.solve(MatrixOperator(matrix), b)
    # rounding of a Krylov method: condition · eps, with a margin for 60 recursions
    assert relative_error(result.x, torch.linalg.solve(matrix, b)) < 1e-13 * condition
    assert result.status is Status.CONVERGED


@pytest.mark.parametrize("solver", [MinimumResidual(max_iterations=60), Direct()], ids=named)
def test_solves_an_indefinite_system(solver):
    matrix, b = spd_matrix(20, 1e2, signs=True), right_hand_side(20)
    result = solver.solve(MatrixOperator(matrix), b)
    assert relative_error(result.x, torch.linalg.solve(matrix, b)) < 1e-10
    assert result.status is Status.CONVERGED


@pytest.mark.parametrize("solver", ALL, ids=named)
def test_reports_products_and_the_true_residual(solver):
    matrix, b = spd_matrix(12, 50.0), right_hand_side(12)
    operator = Counted(matrix)
    result = solver.solve(operator, b)
    assert result.products + result.extra_products == operator.count
    if not isinstance(solver, Amortized):  # whose residual is that of the estimate before its last move
        true = float((matrix @ result.x - b).norm() / b.norm())
        assert result.relative_residual == pytest.approx(true, rel=1e-6, abs=1e-12)
    assert result.x.shape == (12,)


@pytest.mark.parametrize("solver", ALL, ids=named)
def test_zero_right_hand_side_gives_zero(solver):
    result = solver.solve(MatrixOperator(spd_matrix(5, 10.0)), torch.zeros(5, dtype=torch.float64))
    assert (result.x.abs().max(), result.relative_residual, result.products) == (0.0, 0.0, 0)
    assert result.status is Status.CONVERGED


@pytest.mark.parametrize("solver", [s for s in SOLVING if "Nystrom" not in repr(s)], ids=named)
def test_a_multiple_of_the_identity_is_solved_in_one_product_and_not_by_zero(solver):
    operator = MatrixOperator(3.0 * torch.eye(7, dtype=torch.float64))
    b = right_hand_side(7)
    result = solver.solve(operator, b)
    assert relative_error(result.x, b / 3) < 1e-14
    assert result.status is Status.CONVERGED
    assert result.products == (7 if isinstance(solver, Direct) else 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("b_scale", [1e-30, 1e-10, 1e10, 1e30])
@pytest.mark.parametrize("a_scale", [1e-10, 1e10])
@pytest.mark.parametrize("solver", [*SOLVING, Neumann(terms=400), Amortized(products=60, horizon=10**6)], ids=named)
def test_scale_does_not_matter(solver, a_scale, b_scale, dtype):
    if b_scale / a_scale > 1e36 and dtype == torch.float32:
        b_scale = 1e20  # the solution itself must fit
    matrix, b = a_scale * spd_matrix(8, 5.0), right_hand_side(8)
    result = solver.solve(MatrixOperator(matrix.to(dtype)), (b_scale * b).to(dtype))
    wanted = b_scale * torch.linalg.solve(matrix, b)
    assert relative_error(result.x.double() / b_scale, wanted / b_scale) < 1e-4
    assert result.status.succeeded


@pytest.mark.parametrize("solver", SOLVING, ids=named)
def test_singular_and_consistent_gives_the_shortest_solution(solver):
    matrix = spd_matrix(10, 100.0)
    values, vectors = torch.linalg.eigh(matrix)
    values[:3] = 0.0
    matrix = vectors @ torch.diag(values) @ vectors.T
    matrix = (matrix + matrix.T) / 2
    b = matrix @ right_hand_side(10)
    result = solver.solve(MatrixOperator(matrix), b)
    assert relative_error(result.x, torch.linalg.pinv(matrix, hermitian=True) @ b) < 1e-9
    assert result.status is Status.CONVERGED


@pytest.mark.parametrize(
    ("solver", "status"),
    [
        (ConjugateGradient(max_iterations=60, rtol=1e-6), Status.NEGATIVE_CURVATURE),
        (MinimumResidual(max_iterations=60, rtol=1e-6), Status.MAX_ITERATIONS),
        (Direct(), Status.COMPLETE),
    ],
    ids=lambda value: getattr(value, "name", repr(value)),
)
def test_singular_and_inconsistent_leaves_a_residual_and_says_so(solver, status):
    matrix, b = torch.diag(torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)), torch.ones(3, dtype=torch.float64)
    result = solver.solve(MatrixOperator(matrix), b)
    assert result.status is status
    assert result.relative_residual >= 1 / math.sqrt(3) - 1e-12
    assert result.x.abs().max() < 1e3


@pytest.mark.parametrize("solver", [s for s in ALL if not isinstance(s, (Direct, Identity))], ids=named)
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


@pytest.mark.parametrize("solver", ALL, ids=named)
@pytest.mark.parametrize("where", ["operator", "right-hand side"])
def test_nan_ends_in_a_status_and_a_finite_vector(solver, where):
    matrix, b = spd_matrix(6, 10.0), right_hand_side(6)
    operator = MatrixOperator(matrix)
    if where == "operator":
        operator.matrix = torch.full_like(matrix, torch.nan)
    else:
        b[2] = torch.nan
    result = solver.solve(operator, b)
    assert result.status is Status.NONFINITE
    assert torch.equal(result.x, torch.zeros_like(b))


@pytest.mark.parametrize("solver", [ConjugateGradient(max_iterations=1), MinimumResidual(max_iterations=1)], ids=named)
def test_a_warm_start_is_used(solver):
    matrix, b = spd_matrix(12, 50.0), right_hand_side(12)
    near = torch.linalg.solve(matrix, b) + 1e-3 * right_hand_side(12)
    cold = solver.solve(MatrixOperator(matrix), b)
    warm = solver.solve(MatrixOperator(matrix), b, near)
    assert warm.relative_residual < 0.05 * cold.relative_residual
    assert warm.products == cold.products + 1


@pytest.mark.parametrize("solver", ALL, ids=named)
def test_damping_is_that_of_the_damped_matrix(solver):
    matrix, b = spd_matrix(6, 10.0), right_hand_side(6)
    if isinstance(solver, Amortized):
        return  # see test_amortized.py
    damped = type(solver)(**{**vars(solver), "damping": 2.0}).solve(MatrixOperator(matrix), b)
    shifted = solver.solve(MatrixOperator(matrix + 2.0 * torch.eye(6, dtype=torch.float64)), b)
    assert relative_error(damped.x, shifted.x) < 1e-12
    assert damped.relative_residual == pytest.approx(shifted.relative_residual, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("family", [ConjugateGradient, MinimumResidual])
@pytest.mark.parametrize("condition", [1e4, 1e6])
def test_the_residual_is_the_true_one_after_a_long_recursion_in_float32(family, condition):
    matrix, b = spd_matrix(200, condition).float(), right_hand_side(200).float()
    result = family(max_iterations=3000, rtol=1e-5).solve(MatrixOperator(matrix), b)
    true = float((matrix @ result.x - b).norm() / b.norm())
    # a product in float32 is itself known to some eps · ‖A‖‖x‖, a few percent of these residuals
    assert result.relative_residual == pytest.approx(true, rel=0.1)
    assert (result.status is Status.CONVERGED) == (true <= 2e-5)


def test_a_start_that_dwarfs_the_solution_is_dropped_before_it_overflows():
    b = torch.full((4,), 1e-30)
    for solver in (ConjugateGradient(), Amortized()):
        result = solver.solve(MatrixOperator(torch.eye(4)), b, torch.ones(4))
        assert result.status.succeeded
        assert result.x.abs().max() < 1e-28


def test_damping_by_horizon_needs_an_optimizer_and_takes_its_step():
    solver, operator, b = (
        ConjugateGradient(damping="horizon", horizon=50),
        MatrixOperator(spd_matrix(4, 3.0)),
        torch.ones(4),
    )
    with pytest.raises(ValueError, match="needs the inner optimizer"):
        solver.solve(operator, b.double())
    assert solver.with_optimizer(UpdateRule(step=1.0)).system(operator).damping == pytest.approx(1 / 50)
    solver = ConjugateGradient(damping=0.3)
    assert solver.with_optimizer(UpdateRule(step=0.1)).system(operator).damping == 0.3
    assert solver.with_optimizer(UpdateRule(step=0.1, decay=0.5)).system(operator).damping == 0.8


def test_tolerance_ends_the_iteration_and_is_kept():
    operator, b = MatrixOperator(spd_matrix(30, 1e3)), right_hand_side(30)
    for family in (ConjugateGradient, MinimumResidual):
        loose, tight = (family(max_iterations=500, rtol=rtol).solve(operator, b) for rtol in (1e-2, 1e-8))
        assert loose.relative_residual <= 1e-2
        assert tight.relative_residual <= 1e-8
        assert loose.products < tight.products
        few = family(max_iterations=3, rtol=1e-8).solve(operator, b)
        assert (few.status, few.products) == (Status.MAX_ITERATIONS, 3)
        assert family(max_iterations=3).solve(operator, b).status is Status.COMPLETE


@pytest.mark.parametrize("terms", [0, 1, 2, 7])
def test_neumann_is_the_partial_sum(terms):
    matrix, b = spd_matrix(9, 30.0), right_hand_side(9)
    step = 0.9 / 30
    contraction = torch.eye(9, dtype=torch.float64) - step * matrix
    wanted = step * sum(torch.linalg.matrix_power(contraction, j) @ b for j in range(terms + 1))
    result = Neumann(terms=terms, step_size=step).solve(MatrixOperator(matrix), b)
    assert relative_error(result.x, wanted) < 1e-13
    assert (result.products, result.status) == (terms, Status.COMPLETE)


def test_neumann_measures_its_step_and_reports_it():
    matrix, b = spd_matrix(40, 1e3), right_hand_side(40)
    result = Neumann(terms=50).solve(MatrixOperator(matrix), b)
    assert result.step_size == pytest.approx(1e-3, rel=0.05)
    assert result.status is Status.COMPLETE
    assert 0 < result.extra_products <= 11


def test_neumann_with_too_long_a_step_stops_and_names_the_cause():
    matrix, b = spd_matrix(9, 30.0), right_hand_side(9)
    operator = MatrixOperator(matrix)
    result = Neumann(terms=500, step_size=1.0).solve(operator, b)
    assert result.status is Status.DIVERGED
    assert result.x.norm() < 1e3 * b.norm()
    message = diagnose(LinearSystem(operator), result)
    assert "step is too long" in message
    assert "λ_max = 30" in message
    assert "2/η = 2" in message
    reckless = Neumann(terms=50, step_size=1.0, safeguard=False).solve(operator, b)
    assert reckless.x.norm() > 1e60


def test_neumann_without_safeguard_that_overflows_is_not_returned():
    result = Neumann(terms=5000, step_size=1.0, safeguard=False).solve(
        MatrixOperator(spd_matrix(9, 30.0)), right_hand_side(9)
    )
    assert result.status is Status.NONFINITE
    assert result.x.abs().max() == 0.0


@pytest.mark.parametrize("damping", [1e-2, torch.logspace(-3, 0, 12, dtype=torch.float64)], ids=["number", "vector"])
@pytest.mark.parametrize("rank", [3, 12, 40])
def test_nystrom_inverts_what_it_has_seen(rank, damping):
    """At full rank the exact inverse; below, exact for a matrix of that rank."""
    spectrum = (
        torch.cat([torch.tensor([9.0, 4.0, 1.0]), torch.zeros(9)]).double() if rank == 3 else torch.arange(1.0, 13.0)
    )
    basis = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(4))).Q
    matrix, b = basis @ torch.diag(spectrum.double()) @ basis.T, right_hand_side(12)
    matrix = (matrix + matrix.T) / 2
    result = Nystrom(rank=rank, damping=damping).solve(MatrixOperator(matrix), b)
    wanted = torch.linalg.solve(matrix + torch.diag(torch.as_tensor(damping, dtype=torch.float64).expand(12)), b)
    assert relative_error(result.x, wanted) < 1e-9
    assert (result.products, result.extra_products) == (min(rank, 12), 1)


def test_nystrom_draws_its_directions_from_its_seed():
    operator, b = MatrixOperator(spd_matrix(20, 100.0)), right_hand_side(20)
    first, again, other = (Nystrom(rank=3, damping=1.0, seed=seed).solve(operator, b).x for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


def test_nystrom_refuses_to_divide_by_what_it_does_not_see():
    with pytest.raises(ValueError, match=r"Nystrom\(rank=3\) needs damping > 0 on 6 parameters"):
        Nystrom(rank=3).solve(MatrixOperator(spd_matrix(6, 10.0)), right_hand_side(6))


@pytest.mark.parametrize("damping", [0.0, 1e-3])
def test_a_preconditioner_pays_where_few_eigenvalues_stand_out(damping):
    """Sixty large ones, geometrically spaced, and 240 at one."""
    values = torch.cat([torch.logspace(2, 6, 60, dtype=torch.float64), torch.ones(240, dtype=torch.float64)])
    basis = torch.linalg.qr(torch.randn(300, 300, dtype=torch.float64, generator=torch.Generator().manual_seed(5))).Q
    matrix, b = basis @ torch.diag(values) @ basis.T, right_hand_side(300)
    operator = MatrixOperator((matrix + matrix.T) / 2)
    options = {"max_iterations": 500, "rtol": 1e-8, "damping": damping}
    plain = ConjugateGradient(**options).solve(operator, b)
    conditioned = ConjugateGradient(preconditioner=Nystrom(rank=80), **options).solve(operator, b)
    assert plain.status is conditioned.status is Status.CONVERGED
    assert conditioned.products < 100 < plain.products
    assert relative_error(conditioned.x, plain.x) < 1e-4


def test_a_learning_rate_of_zero_moves_no_series():
    solver = Neumann(terms=2, step_size="optimizer").with_optimizer(UpdateRule(0.0))
    result = solver.solve(MatrixOperator(torch.eye(2)), torch.ones(2))
    assert result.status is Status.COMPLETE
    assert not bool(result.x.any())


def test_the_series_of_an_adaptive_optimizer_is_preconditioned():
    matrix, b, terms = spd_matrix(6, 10.0), right_hand_side(6), 9
    step = torch.linspace(0.01, 0.1, 6, dtype=torch.float64)
    result = Neumann(terms=terms, step_size="optimizer").with_optimizer(UpdateRule(step)).solve(MatrixOperator(matrix), b)
    contraction = torch.eye(6, dtype=torch.float64) - torch.diag(step) @ matrix
    wanted = sum(torch.linalg.matrix_power(contraction, j) for j in range(terms + 1)) @ (step * b)
    assert relative_error(result.x, wanted) < 1e-13
    assert result.step_size is None
    with pytest.raises(ValueError, match="'optimizer' needs the inner optimizer"):
        Neumann(step_size="optimizer").solve(MatrixOperator(matrix), b)


def test_identity_is_the_scaled_right_hand_side():
    b = right_hand_side(4)
    assert torch.allclose(Identity(scale=0.25).solve(MatrixOperator(spd_matrix(4, 2.0)), b).x, 0.25 * b)


def test_direct_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="use ConjugateGradient"):
        Direct(max_size=3).solve(MatrixOperator(torch.eye(4)), torch.ones(4))


def test_diagnosis_of_good_results_is_empty_and_costs_nothing():
    operator = Counted(spd_matrix(4, 2.0))
    result = ConjugateGradient().solve(operator, right_hand_side(4))
    spent = operator.count
    assert diagnose(LinearSystem(operator), result) == ""
    assert operator.count == spent


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Neumann(terms=-1), "terms to be an integer >= 0, got -1"),
        (lambda: Neumann(terms=1.5), "terms to be an integer"),
        (lambda: Neumann(step_size=0.0), "step_size > 0, 'auto' or 'optimizer'"),
        (lambda: Neumann(step_size="newton"), "'auto' or 'optimizer', got 'newton'"),
        (lambda: Neumann(step_size=torch.tensor([1.0, -1.0])), "step_size > 0"),
        (lambda: Nystrom(rank=0), "rank to be an integer >= 1"),
        (lambda: ConjugateGradient(preconditioner=Nystrom(damping=1.0)), "takes the damping of the solver"),
        (lambda: Neumann(step_size=math.inf), "finite step_size"),
        (lambda: Identity(scale=-1.0), "scale > 0"),
        (lambda: ConjugateGradient(max_iterations=0), "max_iterations to be an integer >= 1"),
        (lambda: ConjugateGradient(rtol=1.5), "0 <= rtol < 1"),
        (lambda: ConjugateGradient(damping=torch.tensor([1.0, -5.0])), "damping >= 0"),
        (lambda: ConjugateGradient(damping=-1.0), "damping >= 0 or 'horizon', got -1.0"),
        (lambda: MinimumResidual(damping=math.nan), "damping >= 0"),
        (lambda: MinimumResidual(damping="auto"), "'horizon', got 'auto'"),
        (lambda: Direct(max_size=0), "max_size"),
        (lambda: Amortized(products=1), "products to be an integer >= 2"),
        (lambda: Amortized(horizon=0), "horizon to be an integer >= 1"),
    ],
)
def test_options_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("solver", ALL, ids=named)
def test_shapes_are_checked(solver):
    operator = MatrixOperator(torch.eye(3))
    with pytest.raises(ValueError, match=r"expected b of shape \(3,\), got \(4,\)"):
        solver.solve(operator, torch.ones(4))
    with pytest.raises(ValueError, match=r"expected x0 of shape \(3,\), got \(4,\)"):
        solver.solve(operator, torch.ones(3), torch.ones(4))
