"""The default against a grid: its statistics, and a short run."""

import json
import math

import pytest

from examples.experiments import without_tuning as example
from examples.experiments.common import merged

RUNS = {
    (1.0, "untuned"): {"0": 1.0, "1": 0.8},
    (1.0, "default"): {"0": 0.5, "1": 0.5},
    (1.0, "5:0.1"): {"0": 0.4, "1": 0.4},
    (1.0, "5:0.5"): {"0": 2.0, "1": 1.0},
    (30.0, "untuned"): {"0": 1.0, "1": 1.0},
    (30.0, "default"): {"0": 1.2, "1": 1.0},
    (30.0, "5:0.1"): {"0": 0.99, "1": 1.0},
    (30.0, "5:0.5"): {"0": 3.0, "1": 1.0},
}


@pytest.fixture
def results():
    runs, values = [], []
    for (factor, method), by_seed in RUNS.items():
        for seed, value in by_seed.items():
            runs.append(example.Run("text", 300, factor, method, int(seed)))
            values.append({"outer": value, "held out": value, "verdict": "helped" if value < 1 else "harmed"})
            if method == "untuned":
                del values[-1]["verdict"]
    return example.nested(runs, values)


def test_gains_are_fractions_of_that_of_the_best_of_the_grid(results):
    usual, far = example.cells(results, "held out")
    assert usual.best == "5:0.1"
    assert usual.gain("default") == pytest.approx(0.8)
    assert usual.gain("5:0.5") == pytest.approx((0.9 - 1.5) / 0.5)
    assert math.isnan(far.gain("default"))  # the best of the grid gains half a percent
    assert (usual.harm("default"), far.harm("default")) == (False, True)


def test_summary_table_and_details(results):
    summary = example.summary(results)
    assert summary["outer: median gain of the default"] == pytest.approx(0.8)
    assert summary["held out: fraction of cells harmed"] == 0.5
    assert summary["outer: loss over untuned"] == pytest.approx(math.sqrt(0.5 / 0.9 * 1.1))
    default, first, second = example.table(results).split("\n\n")[0].splitlines()[2:]
    assert default.startswith("| 300 | **the default** | .80 | 1 of 1 | 1 of 2 | .78 |")
    assert first.startswith("| 300 | Adam 0.1, every 5 | 1.00 | 1 of 1 | 0 of 2 |")
    assert second.startswith("| 300 | Adam 0.5, every 5 | -1.20 | 0 of 1 | 2 of 2 |")
    assert "| text | 300 | 30 times more | 1.000 | 1.100 | .995 | Adam 0.1, every 5 |" in example.details(results)


def test_verdicts_are_counted_by_what_became_of_the_held_out_loss(results):
    lines = example.verdicts(results).splitlines()
    assert lines[2] == '| "helped" | 2 | 0 | 0 |'
    assert lines[5] == '| "harmed" | 0 | 1 | 1 |'


def test_seeds_by_which_nothing_was_chosen_have_a_table_of_their_own(results):
    more = example.nested(
        [example.Run("text", 300, 1.0, method, 7) for method in ("untuned", "default", "5:0.1")],
        [{"outer": loss, "held out": loss, "verdict": "helped"} for loss in (2.0, 1.0, 1.5)],
    )
    both = merged(results, more)
    assert example.table(both) == example.table(results)
    assert example.fresh(both) == example.table(more)
    assert example.fresh(both).splitlines()[2].startswith("| 300 | **the default** | 2.00 | 1 of 1 | 0 of 1 | .50 |")


def test_variants_take_the_time_of_the_defaults():
    """In gradients: 1,000 steps and 200 hyper steps of five gradients are 2,000."""
    steps = {name: variant.steps(1000) for name, variant in example.VARIANTS.items()}
    assert example.Variant().steps(1000) == 1000
    for name, variant in example.VARIANTS.items():
        assert steps[name] * (1 + variant.cost / variant.every) == pytest.approx(2000, rel=0.01)


def test_variants_are_compared_on_the_seeds_that_they_share():
    runs, values = [], []
    some = dict.fromkeys(list(example.VARIANTS)[:3], 1) | {"SAMA": 2}  # the others were not run
    for method, seeds in {"untuned": 2, "default": 2, **some}.items():
        for seed in range(seeds):
            runs.append(example.Run("text", 1000, 1.0, method, seed))
            value = {"untuned": 1.0, "default": 0.5 + seed}.get(method, 0.8)
            values.append({"outer": value, "held out": value})
    lines = example.variants(example.nested(runs, values)).splitlines()
    assert lines[2] == "| 1,000 | 1 | **the default** | .50 | .50 | 0 of 1 |"
    assert lines[3] == "| 1,000 | 1 | every batch | .80 | .80 | 0 of 1 |"
    assert [line.split("|")[3].strip() for line in lines[3:7]] == ["every batch", "every 2", "every 10", "SAMA"]
    assert lines[7:] == [
        "| 1,000 | 2 | **the default** | 1.00 | 1.00 | 0 of 1 |",
        "| 1,000 | 2 | SAMA | .80 | .80 | 0 of 1 |",
    ]


def test_a_short_run(tmp_path, capsys):
    argv = ["--steps", "10", "--problems", "weight decay", "--grid", "5", "--output", str(tmp_path)]
    figures = example.main(argv)
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == figures
    measured = json.loads((tmp_path / "without_tuning.json").read_text())
    by_method = measured["weight decay"]["10"]["1"]
    assert set(by_method) == {"untuned", "default", *(f"5:{rate}" for rate in example.RATES)}
    assert by_method["default"]["0"]["held out"] != by_method["untuned"]["0"]["held out"]
    assert by_method["default"]["0"]["replaced"] == 0
    assert by_method["5:1.0"]["0"]["verdict"] in ("helped", "did nothing", "unclear", "harmed")
    variants = [example.measure(example.Run("weight decay", 10, 1.0, name, 0)) for name in ("SAMA", "every 2")]
    assert len({run["held out"] for run in (*variants, by_method["default"]["0"])}) == 3
