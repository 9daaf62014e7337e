"""Random networks with each callback: the answer is right or refused in words, and training does not notice."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import lightning as L
import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, seed, settings
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor

from lightning_ifthpo import ExactGeN, IFTHypergradient, SharpnessMonitor, implicit_hypergradient
from lightning_ifthpo.curvature import FiniteDifferenceOperator, GaussNewtonOperator, HessianOperator
from lightning_ifthpo.solvers import ConjugateGradient, Direct, Identity, MinimumResidual, Neumann, Solver
from lightning_ifthpo.spectrum import lanczos
from tests.helpers.device import DEVICE, RandomState, random_state
from tests.helpers.evidence import Run, attempted, disturbed
from tests.helpers.random_networks import FEATURES, MOVING, Description, Problem, RandomBilevel, descriptions
from tests.helpers.reference import Dense, State, flat
from tests.system.test_properties import said_by_us

EXAMPLES = 12  # for each of 43 features: more than 500 in all

# Relative errors of products: exact ones by rounding, about a hundred operations deep; differences as documented.
EXACT = {torch.float32: 1e-4, torch.float64: 1e-10}
DIFFERENCES = {torch.float32: 1e-3, torch.float64: 1e-7}


def truncated_series(terms: int, step_size: float) -> Callable[[Tensor, Tensor], Tensor]:
    """Returns η Σ (1 − ηA)ʲ b as a function of A and b."""

    def solve(matrix: Tensor, b: Tensor) -> Tensor:
        power, total = b, torch.zeros_like(b)
        for _ in range(terms + 1):
            total, power = total + step_size * power, power - step_size * (matrix @ power)
        return total

    return solve


def damped_solution(matrix: Tensor, b: Tensor) -> Tensor:
    return torch.linalg.solve(matrix + torch.eye(len(b)).to(b), b)


# what each solver computes, and the relative residual at which it may stop
SOLVERS: dict[str, tuple[Solver, Callable[[Tensor, Tensor], Tensor], float]] = {
    "direct": (Direct(damping=1.0), damped_solution, 0.0),
    "cg": (ConjugateGradient(max_iterations=200, rtol=1e-4, damping=1.0), damped_solution, 1e-4),
    "minres": (MinimumResidual(max_iterations=200, rtol=1e-4, damping=1.0), damped_solution, 1e-4),
    "neumann": (Neumann(terms=3, step_size=0.1), truncated_series(3, 0.1), 0.0),
    "identity": (Identity(step_size=0.1), truncated_series(0, 0.1), 0.0),
}

OPERATORS = {
    "hessian": HessianOperator,
    "gauss_newton": GaussNewtonOperator,
    "finite_difference": FiniteDifferenceOperator,
}

# Solves that may fail: conjugate gradients on indefinite matrices, and a residual below the error of differences.
HONEST = ("negative curvature", "max_iterations")


# Runs


def run_of(description: Description, callback: L.Callback | None) -> Run:
    options = {"precision": description.precision, "seed": description.seed}
    return Run.of(lambda: RandomBilevel(description), callback, **options)


def states_of(run: Run) -> list[State]:
    """Returns the state of the last measurement, once for each random state that it used."""
    last, outer_batch = run.evidence.last, move_data_to_device(next(iter(run.module.outer_dataloader())), DEVICE)
    return [
        State(last.problem, run.hyperparameters, last.batch, outer_batch, *random_states)
        for random_states in last.pairs_of_random_states()
    ]


# Judgements: empty strings where all is well


def compared(name: str, got: Tensor, wanted: Tensor, bound: Tensor | float) -> str:
    got, bound = got.to(wanted.device, torch.float64), float(bound)
    error = float(torch.linalg.vector_norm(got - wanted))
    return "" if error <= bound else f"{name} is off by {error:.3g}, above {bound:.3g}: {got}, expected {wanted}"


def one_of(complaints: list[str]) -> str:
    """Returns the first complaint, or nothing if one comparison agrees."""
    return "" if not all(complaints) else next(iter(complaints), "nothing was measured")


def references(state: State, curvature: str) -> list[Dense]:
    """Returns the right matrices: two where autograd holds something fixed that moves with the weights."""
    answers, description = [state.dense(curvature)], state.problem.description
    if description.has("spectral_norm"):  # the vectors of the power iteration
        return [*answers, state.differences()]
    if curvature == "hessian" and not description.has("embedding"):  # whose row of padding has no gradient
        matrix = answers[0].matrix
        v = torch.randn(len(matrix), dtype=matrix.dtype, generator=torch.Generator().manual_seed(0)).to(matrix)
        error = torch.linalg.vector_norm(state.product_by_differences(v) - matrix @ v)
        assert error <= 1e-6 * torch.linalg.matrix_norm(matrix, 2) * v.norm() + 1e-9, "the reference is wrong"
    return answers


def accuracy_of(curvature: str, description: Description, said: set[str]) -> float:
    """Returns the relative error of a product; warnings may say that differences took the place of derivatives."""
    by_differences = curvature == "finite_difference" or any("difference" in message for message in said)
    return (DIFFERENCES if by_differences else EXACT)[description.dtype]


def check_hypergradient(dense: Dense, got: list[Tensor], solver: str, accuracy: float) -> str:
    """Compares both terms together, within what errors of products do to a solution."""
    _, solve, residual = SOLVERS[solver]
    q = solve(dense.matrix, dense.v)
    values = torch.linalg.eigvalsh((dense.matrix + dense.matrix.T) / 2)
    smallest = (values + 1.0).abs().min() if solve is damped_solution else 1.0
    condition = (values.abs().max() + 1.0) / smallest
    scale = torch.linalg.matrix_norm(dense.mixed, 2) * (q.norm() + dense.v.norm()) + dense.direct.norm()
    wanted = dense.direct - dense.mixed.T @ q
    return compared("hypergradient", flat(got), wanted, condition * (accuracy + residual) * scale)


def check_ends(dense: Dense, smallest: float, largest: float, accuracy: float) -> str:
    """Compares both ends of the spectrum."""
    values = torch.linalg.eigvalsh((dense.matrix + dense.matrix.T) / 2)
    return compared("spectrum", torch.tensor([smallest, largest]), values[[0, -1]], 2 * accuracy * values.abs().max())


def check_along(state: State, curvature: str, before: Tensor, after: Tensor, got: float, accuracy: float) -> str:
    """Compares the curvature along an update with that of the dense matrix, or with differences over its length."""
    length = torch.linalg.vector_norm(before.double() - after.double())
    unit = (before.double() - after.double()) / length
    matrices = [dense.matrix for dense in references(state, curvature)]
    wanted = [unit @ matrix @ unit for matrix in matrices]
    if curvature == "finite_difference":
        wanted.append(unit @ state.product_by_differences(unit, float(length)))
    rounding = torch.finfo(before.dtype).eps * before.norm() / length
    bound = 10 * (accuracy + rounding) * torch.linalg.matrix_norm(matrices[0], 2)
    return one_of([compared("directional sharpness", torch.tensor(got), value, bound) for value in wanted])


def check_refusal(error: Exception, allowed: bool) -> str:
    assert said_by_us(error), f"{type(error).__name__}: {error}"
    assert allowed, f"refused: {error}"
    return "refused"


def check_run(description: Description, callback: L.Callback, check: Callable[[Run, set[str]], str]) -> str:
    """Returns "right" or "refused"; raises AssertionError if a callback is wrong, or disturbs training."""
    plain, run = run_of(description, None), run_of(description, callback)
    # processors without AVX-512 have no LSTM in bfloat16, with this package or without it
    assume("could not create a primitive descriptor" not in str(plain.error))
    assert plain.error is None, plain.error
    if run.error is not None:
        return check_refusal(run.error, description.may_be_refused)
    said = run.warnings - plain.warnings
    differing = disturbed(plain, run, but_weights=isinstance(callback, ExactGeN))
    assert not differing, differing
    if any("finite differences in" in message and "are not reliable" in message for message in said):
        return "refused"  # with inputs that choose a row by a threshold, the loss jumps
    if run.metrics.get("sharpness/failures") or run.metrics.get("hypergrad/skipped"):
        assert said, "failed without a warning"
        assert description.may_be_refused or any(reason in str(said) for reason in HONEST), f"failed: {said}"
        return "refused"
    wrong = check(run, said)
    assert not wrong, f"{wrong}; warnings {said}"
    return "right"


# What is tried


def hypergradient(description: Description, draw: Any) -> str:
    curvature, solver = drawn_curvature(description, draw, "gradient_outer_product"), draw(st.sampled_from([*SOLVERS]))
    if curvature == "gradient_outer_product":
        solver = "direct"

    def check(run: Run, said: set[str]) -> str:
        accuracy, got = accuracy_of(curvature, description, said), run.evidence.hypergradients[-1]
        answers = [dense for state in states_of(run) for dense in references(state, curvature)]
        return one_of([check_hypergradient(dense, got, solver, accuracy) for dense in answers])

    return check_run(description, IFTHypergradient(1, curvature=curvature, solver=SOLVERS[solver][0]), check)


def observed(description: Description, draw: Any) -> str:
    """The default solver, which has a history: only that it leaves no trace."""
    return check_run(description, IFTHypergradient(1), lambda run, said: "")


def sharpness(description: Description, draw: Any) -> str:
    curvature, rtol = drawn_curvature(description, draw), 1e-4

    def check(run: Run, said: set[str]) -> str:
        # the residual shows that some eigenvalue is near; others may lie beyond (measured: by .4 % of λ_max)
        accuracy = 50 * rtol + accuracy_of(curvature, description, said)
        ends = run.metrics["sharpness/lambda_min"], run.metrics["sharpness/lambda_max"]
        answers = [dense for state in states_of(run) for dense in references(state, curvature)]
        if description.has("left_out"):  # with the weights that no optimizer moves, or without
            answers += [state.dense(curvature, Problem.weights) for state in states_of(run)]
        return one_of([check_ends(dense, *ends, accuracy) for dense in answers])

    monitor = SharpnessMonitor(
        1, curvature=curvature, preconditioned=False, max_iterations=100, rtol=rtol, max_overhead=None
    )
    return check_run(description, monitor, check)


def gen(description: Description, draw: Any) -> str:
    curvature = drawn_curvature(description, draw)

    def check(run: Run, said: set[str]) -> str:
        accuracy = accuracy_of(curvature, description, said) + torch.finfo(torch.float32).eps  # of logged values
        got, (before, after) = run.metrics["gen/directional_sharpness"], run.evidence.last.weights
        return one_of([check_along(state, curvature, before, after, got, accuracy) for state in states_of(run)])

    return check_run(description, ExactGeN(1, curvature=curvature, final_decay=0.0, lr_max=0.1), check)


class Functions:
    """The losses of a problem as functions without arguments, with the state in which they were first called."""

    def __init__(self, description: Description) -> None:
        self.description = description
        self.problem = Problem(description).to(description.dtype)
        self.before = copy.deepcopy(self.problem)
        self.batch, self.outer_batch = (next(iter(description.data(seed, 1))) for seed in (1, 2))
        self.hypers = {"scale": torch.linspace(0.8, 1.2, 4, dtype=description.dtype)}
        if description.loss == "penalty":
            self.hypers["log_decay"] = torch.tensor(-3.0, dtype=description.dtype)
        self.seen: dict[str, RandomState] = {}

    def inner(self) -> Tensor:
        self.seen.setdefault("inner", random_state())
        batch = copy.deepcopy(self.batch)
        return self.problem.train().inner(batch, self.hypers["scale"], self.hypers.get("log_decay"))

    def outer(self) -> Tensor:
        self.seen.setdefault("outer", random_state())
        return self.problem.eval().outer(copy.deepcopy(self.outer_batch), self.hypers["scale"])

    def references(self, curvature: str) -> list[Dense]:
        seen = self.seen["inner"], self.seen.get("outer")
        return references(State(self.before, self.hypers, self.batch, self.outer_batch, *seen), curvature)


def functional(description: Description, draw: Any) -> str:
    """The functions that need no Trainer. They cannot put back what a loss moves, but have to notice."""
    curvature, solver = drawn_curvature(description, draw), draw(st.sampled_from([*SOLVERS]))
    solved, measured, results = Functions(description), Functions(description), []

    def compute() -> None:
        ends = lanczos(OPERATORS[curvature](measured.inner, measured.problem.moved()), rtol=1e-3)
        hypers = list(solved.hypers.values())
        options = {"curvature": curvature, "solver": SOLVERS[solver][0]}
        results.extend(
            [ends, implicit_hypergradient(solved.inner, solved.outer, solved.problem.moved(), hypers, **options)]
        )

    error, said = attempted(compute)
    if error is not None:
        # fused attention has no second derivative, and only a Trainer's run chooses other kernels by itself
        return check_refusal(error, description.may_be_refused or description.has("attention", *MOVING))
    ends, result = results
    accuracy = accuracy_of(curvature, description, said)
    lowest, highest = float(ends.smallest[0]), float(ends.largest[0])
    wrong = one_of([check_ends(a, lowest, highest, 1e-3 + accuracy) for a in measured.references(curvature)])
    assert not wrong, wrong
    if not result.status.succeeded:
        assert result.diagnosis, "failed without a diagnosis"
        return "refused"
    wrong = one_of([check_hypergradient(a, result.gradients, solver, accuracy) for a in solved.references(curvature)])
    assert not wrong, wrong
    return "right"


def drawn_curvature(description: Description, draw: Any, *more: str) -> str:
    """Draws a curvature; differences only where the loss has no kinks."""
    kinds = ["hessian", "gauss_newton", *(["finite_difference"] if description.is_smooth else []), *more]
    return draw(st.sampled_from(kinds))


def explored(feature: str, record: Callable[[str, object], None]) -> Callable[[Callable[..., str]], None]:
    """Runs a check on networks with a feature, the same each time, and reports how many were answered and refused."""

    def decorate(check: Callable[..., str]) -> None:
        outcomes: list[str] = []

        @seed(zlib.crc32(feature.encode()))  # other networks for each feature
        @settings(
            max_examples=EXAMPLES,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(descriptions(feature), st.data())
        def run(description: Description, data: Any) -> None:
            try:
                outcomes.append(check(description, data.draw))
            except AssertionError as error:
                raise AssertionError(f"{error}\n{description!r}") from None

        run()
        record("networks", len(outcomes))
        record("refused", outcomes.count("refused"))

    return decorate


TRIED = [hypergradient, hypergradient, sharpness, gen, functional, observed]


@pytest.mark.slow
@pytest.mark.parametrize("feature", FEATURES)
def test_an_answer_is_right_or_refused_and_training_does_not_notice(feature, record_property):
    @explored(feature, record_property)
    def check(description: Description, draw: Any) -> str:
        return draw(st.sampled_from(TRIED))(description, draw)
