"""Pictures of the documentation are drawn by code from result files."""

import pytest

from examples.experiments import pictures
from examples.experiments.common import HERE, PICTURES, read

DRAWN = [name for name, key in pictures.DRAWN.items() if key in read(name)]


@pytest.mark.parametrize("name", DRAWN)
def test_a_picture_is_drawn_from_the_recorded_results(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pictures, "PICTURES", tmp_path)
    pictures.main([name])
    drawn, shown = (folder / f"{name}.png" for folder in (tmp_path, PICTURES))
    assert 10_000 < drawn.stat().st_size < 300_000
    # fonts differ between machines; another picture would differ by more
    assert drawn.stat().st_size == pytest.approx(shown.stat().st_size, rel=0.1)


def test_pictures_of_cheap_experiments_are_made_by_running_them(monkeypatch):
    ran = []
    for name in pictures.CHEAP:
        experiment = pictures.importlib.import_module(f"examples.experiments.{name}")
        monkeypatch.setattr(experiment, "main", lambda argv, name=name: ran.append((name, argv)))
    pictures.main(list(pictures.CHEAP))
    assert ran == [(name, ["--record"]) for name in pictures.CHEAP]


def test_a_picture_stays_if_its_results_lack_what_it_shows(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pictures, "PICTURES", tmp_path)
    monkeypatch.setattr(pictures, "read", lambda name: {"earlier": True, "scores": {}})
    pictures.main(["learned_augmentation"])
    assert "earlier version" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_an_unknown_name_is_refused(capsys):
    with pytest.raises(SystemExit):
        pictures.main(["mixed"])
    assert "got mixed" in capsys.readouterr().err


def test_pictures_are_small():
    sizes = [path.stat().st_size for path in PICTURES.iterdir()]
    assert max(sizes) < 300_000
    assert sum(sizes) < 3_000_000


def test_every_experiment_that_draws_has_its_picture_made():
    drawing = {path.stem for path in HERE.glob("*.py") if "def draw(" in path.read_text(encoding="utf-8")}
    assert drawing | {"edge_of_stability"} == {*pictures.DRAWN, *pictures.CHEAP}
    assert {path.stem for path in PICTURES.iterdir()} == {*pictures.DRAWN, *pictures.CHEAP}
