"""What is said of a solve that failed."""

from lightning_ifthpo.solvers import (
    ConjugateGradient,
    LinearSystem,
)
from lightning_ifthpo.solvers.diagnosis import diagnose
from tests.helpers.problems import spd_matrix
from tests.helpers.systems import Counted, right_hand_side


def test_diagnosis_of_good_results_is_empty_and_costs_nothing():
    operator = Counted(spd_matrix(4, 2.0))
    result = ConjugateGradient().solve(operator, right_hand_side(4))
    spent = operator.count
    assert diagnose(LinearSystem(operator), result) == ""
    assert operator.count == spent
