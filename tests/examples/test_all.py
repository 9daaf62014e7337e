"""The examples, shortened, and the main job as the README runs it."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    if str(EXAMPLES) not in sys.path:
        sys.path.append(str(EXAMPLES))  # where the examples find each other
    spec.loader.exec_module(module)
    return module


QUIET = [f"--trainer.enable_{option}=false" for option in ("progress_bar", "model_summary", "checkpointing")]
QUICK = {
    "clean_noisy_labels": ["--seeds", "0", "--learn-steps", "120", "--final-steps", "40", "--controls"],
    "tune_weight_decay": ["--seeds", "0", "--steps", "20"],
    "edge_of_stability": ["--fraction", "0.02"],
    "callback_overhead": ["--steps", "20", "--models", "perceptron"],
    "learning_rate_free": ["--optimizers", "SGD"],
    "distill_dataset": ["--seeds", "0", "--steps", "500"],
    "inverse_hessian": ["--pooling", "14"],
    "learned_augmentation": ["--rows", "none", "displacement", "distribution", "--steps", "100"],
    "augmentation_cost": ["--augmentations", "U-Net", "--rounds", "1", "--batch-size", "2"],
    "overfit_validation": ["--models", "linear", "--steps", "60"],
    "stackelberg_gan": ["--seeds", "0", "--steps", "100"],
    "mixed_search": ["--seeds", "0", "--trials", "1", "--steps", "60"],
    "cli": [
        "--config",
        str(EXAMPLES / "configs" / "tune.yaml"),
        "--trainer.max_epochs",
        "2",
        "--trainer.logger=false",
        *QUIET,
    ],
    "compare_inversions": ["--models", "logistic regression", "--unroll", "20"],
    "compare_methods": ["--experiments", "40 % wrong labels", "--steps", "110"],
    "compare_estimators": ["--settings", "A", "--optimizers", "sgd", "--points", "1", "--unroll", "20"],
}
PICTURES = {
    "clean_noisy_labels",
    "tune_weight_decay",
    "edge_of_stability",
    "learning_rate_free",
    "distill_dataset",
    "compare_inversions",
    "inverse_hessian",
    "learned_augmentation",
    "mixed_search",
    "overfit_validation",
    "stackelberg_gan",
}
WRITES = PICTURES | {"compare_methods"}


def test_every_example_is_tested():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == QUICK.keys()


@pytest.mark.parametrize("name", QUICK)
def test_example_runs_shortened(name, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [f"{name}.py"])  # LightningCLI looks there too
    arguments = QUICK[name] + (["--output", str(tmp_path)] if name in WRITES else [])
    result = load(name).main(arguments)
    last = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert last == result
    assert all(set(entry) == {"measured", "expected"} for entry in last.values())
    if name in PICTURES:
        assert 10_000 < (tmp_path / f"{name}.png").stat().st_size < 300_000


def test_the_main_job_reaches_its_target(tmp_path, capsys):
    """Mean of three seeds; one test image of 1,500 is 0.0007."""
    result = load("clean_noisy_labels").main(["--seeds", "0", "1", "2", "--output", str(tmp_path)])
    measured = {name: entry["measured"] for name, entry in result.items()}
    assert measured["learned"] >= 0.925
    assert measured["auc"] >= 0.95
    baseline = max(measured[name] for name in ("noisy", "clean", "both"))
    assert measured["learned"] - baseline >= 0.5 * (measured["oracle"] - baseline)
    assert len(list(tmp_path.rglob("metrics.csv"))) == 3
    assert list(tmp_path.rglob("events.out.tfevents*"))


def test_training_runs_at_the_edge_of_stability(tmp_path, capsys):
    result = load("edge_of_stability").main(["--output", str(tmp_path)])
    assert result["gradient_descent"]["measured"] == pytest.approx(1.0, abs=0.05)
    assert result["adam"]["measured"] == pytest.approx(1.0, abs=0.1)


def test_inversions_are_as_good_as_their_price(tmp_path):
    """At the optimum of logistic regression: conjugate gradients are exact, and KFAC is better than the identity."""
    result = load("compare_inversions").main(
        ["--models", "logistic regression", "--unroll", "5", "--output", str(tmp_path)]
    )
    cosines = [
        result[f"logistic regression, {name}, at the optimum"]["measured"] for name in ("identity", "KFAC", "CG 20")
    ]
    assert cosines == sorted(cosines)
    assert cosines[0] < 0.9 < 0.97 < cosines[1]
    assert cosines[2] == 1.0
