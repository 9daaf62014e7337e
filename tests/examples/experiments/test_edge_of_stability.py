import pytest

from examples.experiments import edge_of_stability as example


def test_training_runs_at_the_edge_of_stability(tmp_path, capsys):
    result = example.main(["--output", str(tmp_path)])
    assert result["gradient_descent"]["measured"] == pytest.approx(1.0, abs=0.05)
    assert result["adam"]["measured"] == pytest.approx(1.0, abs=0.1)
    assert result["gradient_descent, critical"]["measured"] == pytest.approx(1.0, abs=0.05)
    assert result["adam, critical"]["measured"] == pytest.approx(1.0, abs=0.25)
