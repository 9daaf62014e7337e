"""The persistent estimate: where it tends to, at whose pace, and that it cannot run away."""

import pytest
import torch

from lightning_ifthpo.curvature import MatrixOperator
from lightning_ifthpo.optimizers.update_rule import UpdateRule
from lightning_ifthpo.solvers import Amortized, Status
from tests.helpers.device import DEVICE, WHERE, randn, within
from tests.helpers.problems import relative_error, spd_matrix
from tests.helpers.systems import right_hand_side

SIZE = 12


def run(solver, matrix, b, solves=1):
    x = None
    for _ in range(solves):
        result = solver.solve(MatrixOperator(matrix), b, x)
        x = result.next_start
    return result


@pytest.mark.parametrize(
    "rule",
    [
        UpdateRule(step_size=0.01),
        UpdateRule(step_size=0.1),
        UpdateRule(step_size=torch.linspace(0.01, 0.1, SIZE, **WHERE)),
        UpdateRule(step_size=0.01, decay=3.0),
    ],
    ids=["gradient descent", "beyond stability", "preconditioned", "decaying"],
)
@pytest.mark.parametrize("products", [2, 5])
def test_it_tends_to_the_system_damped_by_the_horizon(products, rule):
    matrix, b = spd_matrix(SIZE, 30.0), right_hand_side(SIZE)
    damping = torch.as_tensor(1 / (rule.step_size * 40) + rule.decay, **WHERE).expand(SIZE)
    wanted = torch.linalg.solve(matrix + torch.diag(damping), b)
    result = run(Amortized(products=products, horizon=40).with_optimizer(rule), matrix, b, solves=2000)
    assert relative_error(result.x, wanted) < within(1e-9)
    assert (result.status, result.products) == (Status.COMPLETE, products)
    assert result.relative_residual < within(1e-9)


def test_it_moves_at_the_pace_of_training():
    """Far below the stability limit a solve of K products makes K steps of gradient descent on ½xᵀAx − bᵀx."""
    matrix, b = spd_matrix(SIZE, 10.0), right_hand_side(SIZE)
    step, horizon = 0.01, 100
    damped = matrix + torch.eye(SIZE, **WHERE) / (step * horizon)
    x = torch.zeros_like(b)
    for _ in range(6):
        x = x + step * (b - damped @ x)
    # a cold start needs no product for A·0, and so makes one step more
    result = run(Amortized(products=5, horizon=horizon).with_optimizer(UpdateRule(step)), matrix, b)
    assert relative_error(result.next_start, x) < within(1e-12)
    assert relative_error(result.next_start - result.x, step * (b - damped @ result.x)) < within(1e-10)
    warm = Amortized(products=2, horizon=horizon).with_optimizer(UpdateRule(step)).solve(MatrixOperator(matrix), b, x)
    for iterate in (warm.x, warm.next_start):
        x = x + step * (b - damped @ x)
        assert relative_error(iterate, x) < within(1e-12)


@pytest.mark.parametrize("products", [2, 5])
@pytest.mark.parametrize("excess", [3.0, 40.0, 1e4])
def test_steps_beyond_the_stability_limit_do_not_diverge(products, excess):
    """A new operator each time, all stiffer than the step allows: a plain iteration grows without limit."""
    solver, x, b = (
        Amortized(products=products, horizon=100).with_optimizer(UpdateRule(step_size=excess / 30.0)),
        None,
        right_hand_side(SIZE),
    )
    for seed in range(200):
        noise = randn(SIZE, SIZE, seed=seed) / SIZE
        matrix = spd_matrix(SIZE, 30.0) + noise @ noise.T
        result = solver.solve(MatrixOperator(matrix), b, x)
        x = result.next_start
    bound = 100 * (excess / 30.0) * b.norm()
    assert result.status is Status.COMPLETE
    assert x.norm() <= bound * (1 + within(1e-12))


def test_weights_that_no_optimizer_moves_have_no_estimate():
    step = torch.full((SIZE,), 0.01, **WHERE)
    step[3] = 0.0
    result = run(Amortized().with_optimizer(UpdateRule(step)), spd_matrix(SIZE, 30.0), right_hand_side(SIZE), solves=20)
    assert result.x[3] == 0.0
    assert bool(torch.isfinite(result.x).all())
    assert result.x.count_nonzero() == SIZE - 1


def test_without_an_optimizer_it_measures_its_step():
    matrix, b = spd_matrix(SIZE, 30.0), right_hand_side(SIZE)
    result = run(Amortized(products=2, horizon=10**6), matrix, b, solves=400)
    assert relative_error(result.x, torch.linalg.solve(matrix, b)) < within(1e-3)
    assert result.extra_products > 0
    assert result.step_size == pytest.approx(1 / 30, rel=0.05)


def test_a_zero_operator_gives_the_horizon_times_the_step():
    b = right_hand_side(SIZE)
    result = run(
        Amortized(horizon=50).with_optimizer(UpdateRule(step_size=0.1)), torch.zeros(SIZE, SIZE, **WHERE), b, 400
    )
    assert relative_error(result.x, 50 * 0.1 * b) < within(1e-3)


def test_a_start_that_is_too_long_is_shortened_before_its_length_overflows():
    """Infinity over infinity would be the curvature along it."""
    b = torch.full((1000,), 1000**-0.5, device=DEVICE)
    operator = MatrixOperator(1e10 * torch.eye(1000, device=DEVICE))
    solver = Amortized(damping=0.0).with_optimizer(UpdateRule(1e-9))
    for entry in (1e-3, 1e3, 1e8, 5e12):
        result = solver.solve(operator, b, torch.full((1000,), entry, device=DEVICE))
        assert result.status is Status.COMPLETE
        # each of two moves leads to b / 1e10, from a start of length horizon · step with an image of length 1000
        assert relative_error(result.next_start, b / 1e10) < 1000 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("length", [1e-4, 1.0, 1e3, 1e4])
def test_the_length_of_the_right_hand_side_does_not_matter_in_half_precision(length):
    values = torch.linspace(0.1, 1.0, 300, dtype=torch.float64, device=DEVICE)
    b = randn(300, seed=0, dtype=torch.float64)
    b = length * b / b.norm()

    def solved(dtype):
        solver, x = Amortized(damping=0.0).with_optimizer(UpdateRule(1.0)), None
        for _ in range(3):
            result = solver.solve(MatrixOperator(torch.diag(values).to(dtype)), b.to(dtype), x)
            x = result.next_start
        assert result.status is Status.COMPLETE
        return result.x.double()

    assert relative_error(solved(torch.float16), solved(torch.float64)) < 0.02


def test_a_damping_beyond_all_numbers_is_told():
    operator = MatrixOperator(torch.eye(2, device=DEVICE))
    assert (
        Amortized().with_optimizer(UpdateRule(1e-42)).solve(operator, torch.ones(2, device=DEVICE)).status
        is Status.NONFINITE
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Amortized(products=1), "products to be an integer >= 2"),
        (lambda: Amortized(horizon=0), "horizon to be an integer >= 1"),
    ],
)
def test_options_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_all_moves_are_as_short_as_the_largest_curvature_seen_asks_for():
    """The iteration as it is defined, with dense matrices, at a step three times as long as is stable."""
    matrix, b, step, horizon = spd_matrix(SIZE, 30.0), right_hand_side(SIZE), 0.2, 10**6
    b = b / b.norm()
    damped = matrix + torch.eye(SIZE, **WHERE) / (step * horizon)
    x, paces = torch.zeros_like(b), []
    for last in (False, False, True):
        residual = b - damped @ x
        if not last:
            paces.append(float(step * (residual @ damped @ residual) / (residual @ residual)))
        x = x + step / max(1.0, *paces) * residual
    result = run(Amortized(products=2, horizon=horizon).with_optimizer(UpdateRule(step)), matrix, b)
    assert max(paces) > 1.0
    assert relative_error(result.next_start, x) < within(1e-12)


@pytest.mark.parametrize("step", [0.0, torch.zeros(SIZE, **WHERE)], ids=["number", "vector"])
def test_a_learning_rate_of_zero_moves_no_estimate(step):
    result = run(Amortized().with_optimizer(UpdateRule(step)), spd_matrix(SIZE, 30.0), right_hand_side(SIZE), solves=3)
    assert result.status is Status.COMPLETE
    assert not bool(result.x.any())


def test_an_estimate_that_is_too_long_is_shortened_to_the_longest_that_an_inverse_can_have():
    """Of a zero operator: horizon · s · b, in the direction of the start, which is that of b."""
    b, step, horizon = right_hand_side(SIZE), 0.1, 50
    solver = Amortized(horizon=horizon).with_optimizer(UpdateRule(step))
    longest = horizon * step * b
    result = solver.solve(MatrixOperator(torch.zeros(SIZE, SIZE, **WHERE)), b, 10.0 * longest)
    assert relative_error(result.x, longest) < within(1e-12)


def test_curvature_along_the_estimate_shortens_its_moves():
    """A step of 0.1 is ten times the inverse of the curvature along the estimate, and a tenth of that of its moves."""
    operator = MatrixOperator(torch.diag(torch.tensor([100.0, 1.0], **WHERE)))
    b, start = torch.tensor([100.0, 1.0], **WHERE), torch.tensor([1.0, 0.0], **WHERE)
    result = Amortized(damping=0.0).with_optimizer(UpdateRule(0.1)).solve(operator, b, start)
    # two moves of a hundredth of the residual, which is 1 and then 0.99
    assert result.x.tolist() == pytest.approx([1.0, 0.01], rel=within(1e-12))
    assert result.next_start.tolist() == pytest.approx([1.0, 0.01 + 0.0099], rel=within(1e-12))


def test_the_parts_of_the_estimate_are_vectors_whose_products_are_known():
    matrix, b, seen = spd_matrix(SIZE, 30.0), 7.0 * right_hand_side(SIZE), []

    class Spy(MatrixOperator):
        def matvec(self, v):
            seen.append(v)
            return super().matvec(v)

    for start in (None, right_hand_side(SIZE)):
        result = Amortized(products=3).with_optimizer(UpdateRule(0.02)).solve(Spy(matrix), b, start)
        assert len(result.parts) == 3
        assert all(any(vector is other for other in seen) for _, vector in result.parts)
        assert relative_error(sum(share * vector for share, vector in result.parts), result.x) < within(1e-14)
