"""The comparison with grids of rates."""

import pytest

from examples.experiments import common
from examples.experiments import learning_rate_free as example


@pytest.mark.parametrize(
    ("optimizer", "chosen", "full", "expected"),
    [
        ("AdamW", list(example.METHODS), True, ["constant", "cosine", "AutoGeN", "Prodigy", "ExactGeN"]),
        ("SGD", list(example.METHODS), True, ["constant", "cosine", "AutoGeN", "ExactGeN"]),
        ("SGD", list(example.METHODS), False, ["constant", "ExactGeN"]),
        ("AdamW", ["ExactGeN"], True, ["ExactGeN"]),
    ],
)
def test_who_takes_part(optimizer, chosen, full, expected, monkeypatch):
    monkeypatch.setattr(common, "find_spec", lambda name: name)
    assert example.taking_part(optimizer, chosen, full=full) == expected
    monkeypatch.setattr(common, "find_spec", lambda name: None)
    installed = [method for method in expected if method not in ("AutoGeN", "Prodigy")]
    assert example.taking_part(optimizer, chosen, full=full) == installed


@pytest.mark.parametrize("options", [[], ["--full"], ["--seeds", "0", "1", "2"]])
def test_a_part_that_cannot_stand_beside_the_recorded_runs_is_refused_before_training(options, capsys):
    with pytest.raises(SystemExit):
        example.main(["--methods", "ExactGeN", *options])
    assert "needs --full --seeds 0 1 2" in capsys.readouterr().err


def test_a_method_that_is_not_installed_is_not_passed_off_as_measured(monkeypatch, capsys):
    monkeypatch.setattr(common, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        example.main(["--full", "--seeds", "0", "1", "2", "--methods", "ExactGeN", "Prodigy"])
    assert "not installed: Prodigy" in capsys.readouterr().err


def test_methods_that_are_not_run_are_as_recorded(tmp_path, monkeypatch):
    monkeypatch.setattr(example, "measured", lambda *_, **__: {"ExactGeN": {"1": {"0": 50.0}}})
    options = ["--full", "--seeds", "0", "1", "2", "--methods", "ExactGeN", "--output", str(tmp_path)]
    recorded = example.read(example.NAME)["cells"]
    for name, figure in example.main(options).items():
        constant = example.best(recorded[name]["constant"])[1]
        assert figure["measured"] == pytest.approx(50.0 - example.mean(constant), abs=0.01)
