import json

import pytest
import torch

from examples.experiments import inverse_hessian as example
from lightning_ifthpo.curvature import HessianOperator
from lightning_ifthpo.solvers import Identity, Neumann


@pytest.fixture(scope="module")
def trained():
    """Sixteen pixels: 170 weights."""
    problem = example.Problem(pooling=7)
    problem.train()
    hessian = HessianOperator(problem.loss, problem.parameters).to_dense()
    return problem, hessian, example.Spectrum(*torch.linalg.eigh(hessian))


@pytest.mark.parametrize("solver", [Identity(0.7), Neumann(7, step_size=0.3, damping=0.1)], ids=["identity", "neumann"])
def test_a_series_is_the_same_in_the_eigenbasis_as_by_columns(trained, solver):
    _, hessian, spectrum = trained
    torch.testing.assert_close(spectrum.inverse_by(solver), example.inverse_by_columns(solver, hessian))


def test_unrolled_steps_invert_as_the_neumann_series(trained):
    problem, _, spectrum = trained
    assert example.unrolled_difference(problem, spectrum) < 1e-6  # the gradient at the end, 1e-9, is magnified


def test_more_work_is_nearer_to_the_exact_inverse(tmp_path, capsys):
    result = example.main(["--pooling", "7", "--output", str(tmp_path)])
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
    assert all(entry["expected"] is None for name, entry in result.items() if name != "unrolled against Neumann")
    error = {name.removesuffix(", error"): entry["measured"] for name, entry in result.items()}
    series = [error[name] for name in ("Neumann 100", "Neumann 20", "Neumann 5", "Neumann 1", "identity")]
    assert series == sorted(series)
    assert series[0] < 0.9 * series[-1]
    assert error["CG 20"] < error["CG 5"] < 0.5
    assert error["KFAC"] < 0.5 * error["gradient outer product"]
    assert error["Gauss–Newton"] == 0.0
    assert 10_000 < (tmp_path / "inverse_hessian.png").stat().st_size < 300_000
