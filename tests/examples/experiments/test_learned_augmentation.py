import math

import numpy as np
import pytest

from examples.experiments import learned_augmentation as example
from tests.examples.experiments.data_files import accept_cifar, write_cifar


def test_the_learned_distribution_beats_its_start_and_all_labels(tmp_path, monkeypatch, capsys):
    row = example.ROWS["distribution"]._replace(hyper_rate=0.1)  # in so short a run
    monkeypatch.setitem(example.ROWS, "distribution", row)
    rows = ["none_700", "distribution_start", "distribution"]
    result = example.main(["--rows", *rows, "--steps", "200", "--output", str(tmp_path)])
    all_labels, start, learned = (result[name]["measured"] for name in rows)
    # of 4,000 test images; 0.02 is five standard errors
    assert learned > start + 0.02
    assert learned > all_labels + 0.02


def test_only_learned_augmentations_are_tuned_and_only_in_the_first_part(tmp_path, monkeypatch, capsys):
    steps, configure = [], example.Classifier.configure_hyper_optimizer

    def recording(module):
        optimizer = configure(module)
        optimizer.register_step_post_hook(lambda *_: steps.append(module.global_step))
        return optimizer

    monkeypatch.setattr(example.Classifier, "configure_hyper_optimizer", recording)
    monkeypatch.setattr(example, "WARM_UP", 10)
    monkeypatch.setitem(example.ROWS, "distribution", example.ROWS["distribution"]._replace(hyper_every=5))
    monkeypatch.setattr(example, "TUNED", 0.6)
    rows = ["distribution_start", "distribution"]
    result = example.main(["--validation", "--rows", *rows, "--steps", "50", "--output", str(tmp_path)])
    assert steps == [15, 20, 25, 30]
    hits = [example.VALIDATION * result[name]["measured"] for name in rows]
    assert hits == pytest.approx([round(hit) for hit in hits], abs=0.02)  # parts of 3,300 test images would not be


def test_what_uses_a_learned_augmentation_comes_after_it(capsys):
    with pytest.raises(SystemExit):
        example.main(["--rows", "distribution_700", "distribution"])
    assert "distribution_700 uses what distribution has learned" in capsys.readouterr().err


def test_cifar_is_read_from_its_files(tmp_path, monkeypatch, capsys):
    write_cifar(tmp_path, np.random.default_rng(0), "cifar10")
    accept_cifar(monkeypatch)
    split = example.load_data("cifar10", 0, tmp_path, download=False)
    assert [len(labels) for _, labels in split] == [160, 20, 20, 10]
    assert all(images.shape[1:] == (3, 32, 32) and images.max() <= 1.0 for images, _ in split)
    assert math.isclose(split.train[0].mean(), 0.5, abs_tol=0.01)

    monkeypatch.setattr(example, "WARM_UP", 0)
    arguments = ["--dataset", "cifar10", "--root", str(tmp_path), "--steps", "10", "--output", str(tmp_path)]
    result = example.main(arguments)
    assert all(entry["expected"] is None for entry in result.values())
    assert 10_000 < (tmp_path / "learned_augmentation.png").stat().st_size < 300_000
