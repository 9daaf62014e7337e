import json

import pytest
import torch
from torch.utils.data import ConcatDataset, TensorDataset

from examples.experiments import common


def test_statistics_over_seeds():
    values = {"0": 0.90, "1": 0.92, "2": 0.97}
    assert common.mean(values) == pytest.approx(0.93)
    assert common.mean(values, (1, 2)) == pytest.approx(0.945)
    assert common.spread(values) == ".930 ± .029"  # √((0.0009 + 0.0001 + 0.0016) / 3)
    assert common.extent(values) == ".900–.970"


def test_one_seed_has_no_deviation():
    assert common.spread({"0": 0.9}) == ".900"
    assert common.extent({"0": 0.9}) == ".900"


def test_means_of_an_earlier_run():
    assert common.spread({"mean": 0.9, "deviation": 0.01}) == ".900 ± .010"
    assert common.spread({"mean": 1.0}) == "1.000"


def test_results_are_read_as_they_were_written(tmp_path):
    results = {"a": {"0": 1.5, "1": [1, [2.0]]}, "b": {}, "é": None}
    path = common.write("x", results, tmp_path)
    assert common.read("x", tmp_path) == json.loads(path.read_text(encoding="utf-8")) == results
    assert common.read("missing", tmp_path) == {}


def test_seeds_are_added_to_those_recorded():
    old, new = {"scores": {"a": {"0": 1.0, "1": 2.0}}, "n": 1}, {"scores": {"a": {"1": 3.0}, "b": {"0": 4.0}}, "n": 2}
    assert common.merged(old, new) == {"scores": {"a": {"0": 1.0, "1": 3.0}, "b": {"0": 4.0}}, "n": 2}


def test_what_to_expect_is_that_of_the_same_seeds_and_rows():
    recorded = {"scores": {"a": {"0": 1.0, "1": 2.0}, "b": {"0": 5.0}, "c": {"mean": 7.0}}}
    run = {"scores": {"a": {"1": 9.0}, "c": {"4": 9.0}}}
    assert common.restricted(recorded, run) == {"scores": {"a": {"1": 2.0}, "c": {"mean": 7.0}}}
    # of a seed that was not recorded, the mean of those that were
    assert common.restricted(recorded, {"scores": {"b": {"3": 1.0}}}) == {"scores": {"b": {"0": 5.0}}}


@pytest.fixture
def folders(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "RECORDED", tmp_path / "recorded")
    return tmp_path


def conclude(folders, seed, value, *arguments, **options):
    args = common.make_parser("A test.", seeds=[0]).parse_args(["--output", str(folders / "output"), *arguments])
    return common.conclude(
        "x",
        {"scores": {str(seed): value}},
        args,
        summary=lambda results: {"score": common.mean(results["scores"])},
        table=lambda results: common.markdown(["score"], [[common.spread(results["scores"])]]),
        **options,
    )


def test_a_run_is_recorded_only_when_asked_for(folders, capsys):
    assert conclude(folders, 0, 0.5) == {"score": {"measured": 0.5, "expected": None}}
    assert not (folders / "recorded").exists()
    conclude(folders, 0, 0.5, "--record")
    conclude(folders, 1, 0.7, "--record")
    assert common.read("x")["scores"] == {"0": 0.5, "1": 0.7}
    assert conclude(folders, 1, 0.6) == {"score": {"measured": 0.6, "expected": 0.7}}
    assert conclude(folders, 1, 0.6, comparable=False) == {"score": {"measured": 0.6, "expected": None}}
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"score": {"measured": 0.6, "expected": None}}


def test_a_run_takes_the_place_of_an_earlier_one(folders, capsys):
    common.write("x", {"earlier": True, "measured": ["long ago"], "scores": {"mean": 0.4}}, folders / "recorded")
    assert conclude(folders, 0, 0.5) == {"score": {"measured": 0.5, "expected": 0.4}}
    conclude(folders, 0, 0.5, "--record")
    recorded = common.read("x")
    assert recorded["scores"] == {"0": 0.5}
    assert "earlier" not in recorded
    assert recorded["measured"] != ["long ago"]


def test_images_survive_as_text():
    images = torch.arange(12).view(2, 1, 2, 3) / 11
    assert torch.allclose(common.from_hex(common.to_hex(images), (2, 1, 2, 3)), images, atol=0.5 / 255 + 1e-6)


def test_random_batches_are_the_same_whatever_the_data_set():
    data = TensorDataset(torch.arange(10))
    alone, joined = (
        torch.stack([batch[0] for batch in common.random_batches(dataset, 4, steps=5, seed=3)])
        for dataset in (data, ConcatDataset([data]))
    )
    assert alone.shape == (5, 4)
    assert torch.equal(alone, joined)
