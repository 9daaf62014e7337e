"""The experiments, shortened."""

import importlib
import json

import pytest

from examples.experiments.common import HERE, read

QUICK = {
    "clean_noisy_labels": ["--seeds", "0", "--learn-steps", "120", "--final-steps", "40"],
    "label_noise": [
        *("--datasets", "MNIST", "--noises", "pair", "--rates", "0.45", "--seeds", "0"),
        *("--learn-steps", "120", "--final-steps", "20"),
    ],
    "without_tuning": ["--steps", "20", "--problems", "regression"],
    "tune_weight_decay": ["--seeds", "0", "--steps", "20"],
    "class_imbalance": ["--seeds", "0", "--steps", "20"],
    "edge_of_stability": ["--fraction", "0.02"],
    "callback_overhead": ["--steps", "20", "--models", "perceptron"],
    "learning_rate_free": ["--optimizers", "SGD"],
    "learning_rates": [
        *("--workloads", "wine", "--seeds", "3", "--methods", "constant", "fixed", "ExactGeN", "suggested"),
        *("schedule-free", "AutoGeN"),
    ],
    "alarms": ["--workloads", "wine", "--seeds", "4"],
    "distill_dataset": ["--seeds", "0", "--steps", "200"],
    "inverse_hessian": ["--pooling", "14"],
    "learned_augmentation": ["--rows", "none", "displacement", "distribution", "--steps", "100"],
    "augmentation_cost": ["--augmentations", "U-Net", "--rounds", "1", "--batch-size", "2"],
    "overfit_validation": ["--models", "linear", "--steps", "60"],
    "stackelberg_gan": ["--seeds", "0", "--steps", "100"],
    "mixed_search": ["--seeds", "0", "--trials", "1", "--steps", "60"],
    "compare_inversions": ["--models", "logistic regression", "--unroll", "5"],
    "compare_methods": ["--experiments", "ten distilled images", "--steps", "40"],
    "compare_estimators": ["--settings", "A", "--optimizers", "sgd", "--points", "1", "--unroll", "5"],
}
PICTURES = {
    "clean_noisy_labels",
    "label_noise",
    "class_imbalance",
    "tune_weight_decay",
    "edge_of_stability",
    "learning_rate_free",
    "learning_rates",
    "distill_dataset",
    "compare_inversions",
    "inverse_hessian",
    "learned_augmentation",
    "mixed_search",
    "overfit_validation",
    "stackelberg_gan",
}


def test_every_experiment_is_tested():
    files = {path.stem for path in HERE.glob("*.py")}
    assert files - {"common", "style", "tables", "pictures", "record", "watching"} == QUICK.keys()


@pytest.mark.parametrize("name", QUICK)
def test_experiment_runs_shortened(name, tmp_path, capsys):
    experiment = importlib.import_module(f"examples.experiments.{name}")
    result = experiment.main([*QUICK[name], "--output", str(tmp_path)])
    printed = capsys.readouterr().out.strip().splitlines()
    last = json.loads(printed[-1])
    assert last == result
    assert all(set(entry) == {"measured", "expected"} for entry in last.values())
    if name in PICTURES:
        assert 10_000 < (tmp_path / f"{name}.png").stat().st_size < 300_000
    # table and figures are made from the file alone
    results = read(name, tmp_path)
    assert experiment.table(results) in "\n".join(printed)
    assert experiment.summary(results).keys() == last.keys()
