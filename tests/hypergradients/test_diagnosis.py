"""What is said of a hypergradient: the true cause of each fault, and nothing where all is well."""

import itertools
import re
from pathlib import Path

import pytest
import torch

from lightning_ifthpo.curvature.kinds import OPERATORS
from lightning_ifthpo.hypergradients import implicit_hypergradient
from lightning_ifthpo.solvers import ConjugateGradient
from lightning_ifthpo.solvers.causes import Cause
from tests.helpers import diagnosis_table
from tests.helpers.device import FLOAT64
from tests.helpers.situations import Situation, faulty, healthy, softmax


@pytest.mark.slow
@pytest.mark.parametrize("situation", [*faulty(), *healthy()], ids=lambda situation: situation.name)
def test_the_diagnosis_names_the_true_cause(situation):
    diagnosis, succeeded = situation.run()
    assert diagnosis_table.is_right(situation, diagnosis, succeeded), diagnosis


@pytest.mark.slow
def test_the_page_of_the_documentation_is_what_is_said_now():
    page = Path(__file__).parents[2] / "docs" / "diagnoses.md"
    assert page.read_text(encoding="utf-8") == diagnosis_table.page()


def test_the_battery_is_large_and_knows_every_cause():
    assert len(faulty()) >= 44
    assert len(healthy()) >= 40
    # a solve that overflows at a right step is tested with the solvers
    assert {situation.cause for situation in faulty()} == set(Cause) - {Cause.OVERFLOW}


@pytest.mark.parametrize("cause", Cause)
def test_no_two_causes_are_told_by_the_same_words(cause):
    parts = [cause.title, cause.meaning, *(remedy.advice for remedy in cause.remedies)]
    numbers = dict.fromkeys(re.findall(r"{(\w+)}", "".join(parts)), "7")
    for solver, curvature in itertools.product(("Neumann", "Amortized", "MinimumResidual", "Direct"), OPERATORS):
        message = cause.describe({solver, curvature, "float64"}, **numbers)
        assert diagnosis_table.named(message) is cause
        assert "{" not in message
        assert message.count(". ") >= 1  # what it means, and what to do


ALREADY_SO = [
    (["gauss_newton"], "use Gauss–Newton"),
    (["kfac"], "use Gauss–Newton"),
    (["finite_difference"], "use curvature='finite_difference'"),
    (["Neumann", "auto"], "step_size='auto'"),
    (["ConjugateGradient"], "step_size='auto'"),
    (["Identity"], "step_size='auto'"),
    (["MinimumResidual"], "use MinimumResidual(),"),
    (["float64"], "use float64"),
    (["Neumann"], "few Neumann terms"),
    (["Amortized"], "Amortized()"),
]


@pytest.mark.parametrize(("settings", "advice"), ALREADY_SO, ids=str)
def test_no_advice_is_so_already(settings, advice):
    given = [remedy for cause in Cause for remedy in cause.remedies if advice in remedy.advice]
    assert given
    assert not any(remedy.applies(settings) for remedy in given)


def test_the_table_shows_every_situation_and_counts():
    situations = [
        Situation(
            "a step", lambda: (Cause.STEP_TOO_LONG.describe(step="η = 1", best="0.1"), False), Cause.STEP_TOO_LONG
        ),
        Situation("a miss", lambda: ("", True), Cause.SINGULAR),
        Situation("a false alarm", lambda: ("NaN", True)),
        Situation("all is well", lambda: ("", True)),
        Situation("silent and failed", lambda: ("", False)),
    ]
    text = diagnosis_table.table(situations)
    assert "| a step | step too long | the step is too long |" in text
    assert "| all is well | — | — |" in text
    assert text.endswith("2 of 5 are right.")
    assert all(cause.title in diagnosis_table.causes() for cause in Cause)


def test_the_diagnosis_of_a_success_costs_no_product():
    problem, calls = softmax(), []
    inner = problem.inner

    def counted():
        calls.append(1)
        return inner()

    for diagnosed in (True, False):
        implicit_hypergradient(
            counted,
            problem.outer,
            problem.weights,
            problem.hyperparameters,
            solver=ConjugateGradient(),
            diagnosed=diagnosed,
        )
    # More evaluations show that the loss follows its gradient: two in the weights, because at a minimum a step on one
    # side says nothing, and two in the hyperparameters.
    assert len(calls) == (1 + 2 + 2) + 1


def test_a_solution_of_zero_is_no_hyperparameter_without_influence():
    """By differences, the mixed product with x = 0 is zero, and not zero by structure."""
    w, lam = torch.ones(2, **FLOAT64, requires_grad=True), torch.tensor(1.0, **FLOAT64)
    signs = torch.tensor([1.0, -1.0], **FLOAT64)
    for curvature in ("hessian", "finite_difference"):
        result = implicit_hypergradient(
            lambda: lam * (signs * w.square()).sum(), lambda: w.sum(), [w], [lam], curvature=curvature
        )
        assert not bool(result.solution.x.any())
        assert result.unused == ()
        assert result.diagnosis.startswith("negative curvature")
