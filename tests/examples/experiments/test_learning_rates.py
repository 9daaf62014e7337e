"""Learning rates side by side: what is read off the results."""

import math

import pytest

from examples.experiments import learning_rates as example
from examples.experiments.common import read

RESULTS = {
    "held_out": {},
    "test": {
        "wine": {
            "fixed": {"3": 1.0},
            "ExactGeN": {"3": 0.5},
            "cosine": {"3": 0.4},
            "constant": {"3": 0.5},
            "suggested": {"3": 0.4},
        },
        "GRU": {
            "fixed": {"3": 1.0},
            "ExactGeN": {"3": math.nan},
            "cosine": {"3": 2.0},
            "constant": {"3": 4.0},
            "suggested": {"3": 3.0},
        },
    },
    "reached": {"wine": {"3": 0.25}, "GRU": {"3": 1.0}},
}


def test_a_profile_is_the_fraction_of_workloads_within_a_factor_of_the_best():
    assert example.profile(RESULTS, "fixed", [1.0, 2.4, 2.5]) == [0.5, 0.5, 1.0]
    assert example.profile(RESULTS, "cosine", [1.0, 2.0]) == [0.5, 1.0]


def test_a_run_that_has_diverged_is_last():
    assert example.profile(RESULTS, "ExactGeN", [1.25, 1e9]) == [0.5, 0.5]
    assert example.ranks(RESULTS, ["fixed", "ExactGeN"]) == {"fixed": 1.5, "ExactGeN": 1.5}
    assert example.summary(RESULTS)["not worse than the fixed setting"] == 1.0


def test_methods_that_are_not_run_are_as_recorded():
    found = example.recorded(["wine", "LoRA"], [4, 5])
    whole = read(example.NAME)
    assert list(found["test"]) == ["wine", "LoRA"]
    assert found["test"]["LoRA"]["cosine"] == {seed: whole["test"]["LoRA"]["cosine"][seed] for seed in ("4", "5")}
    assert found["held_out"]["wine"] == whole["held_out"]["wine"]
    assert set(found["reached"]["wine"]) == {"4", "5"}
    with pytest.raises(KeyError):
        example.recorded(["none"], [4])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--methods", "ExactGeN"], "ExactGeN and fixed together"),
        (["--methods", "cosine", "--seeds", "8"], "for seeds 3, 4, 5, 6, 7 only"),
    ],
)
def test_a_part_that_cannot_stand_beside_the_recorded_runs_is_refused_before_training(options, message, capsys):
    with pytest.raises(SystemExit):
        example.main(options)
    assert message in capsys.readouterr().err
