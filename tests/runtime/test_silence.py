"""Loggers that write nothing, and look like the real ones."""

from pathlib import Path

import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyLogger, Logger

from lightning_ifthpo.runtime.silence import silenced


def files(folder):
    return sorted((path, path.stat().st_size) for path in Path(folder).rglob("*") if path.is_file())


LOGGERS = {
    "CSV": (CSVLogger, lambda experiment: experiment.log_metrics({"x": 3.0}, 2)),
    "TensorBoard": (TensorBoardLogger, lambda experiment: (experiment.add_scalar("x", 3.0), experiment.flush())),
}


@pytest.mark.parametrize("name", LOGGERS)
def test_a_stand_in_has_the_class_and_the_directories_and_writes_nothing(name, tmp_path):
    make, write = LOGGERS[name]
    logger = make(tmp_path)
    logger.log_metrics({"x": 1.0}, step=0)
    logger.save()
    stand_in, before = silenced(logger), files(tmp_path)
    assert isinstance(stand_in, type(logger))
    assert type(stand_in).__name__ == type(logger).__name__
    assert (stand_in.log_dir, stand_in.save_dir) == (logger.log_dir, logger.save_dir)
    assert (stand_in.name, stand_in.version) == (logger.name, logger.version)
    stand_in.log_metrics({"x": 2.0}, step=1)
    stand_in.log_hyperparams({"a": 1})
    write(stand_in.experiment)
    stand_in.save()
    stand_in.finalize("success")
    logger.save()
    assert files(tmp_path) == before


def test_a_version_is_chosen_before_somebody_makes_directories(tmp_path):
    logger = CSVLogger(tmp_path)
    (Path(silenced(logger).log_dir) / "pictures").mkdir(parents=True)
    assert logger.version == 0


class Own(Logger):
    """A logger of the user's."""

    def __init__(self):
        self.written, self.run = [], Run()

    name, version = "own", 3

    @property
    def experiment(self):
        return self.run

    def log_metrics(self, metrics, step=None):
        self.written.append(metrics)

    def log_hyperparams(self, *arguments, **keywords):
        self.written.append(arguments)

    def write(self, text):
        self.written.append(text)


class Run:
    def __init__(self):
        self.directory, self.table, self.config = Path("runs"), {}, {"lr": 1.0}

    def watch(self):
        self.table["watched"] = True


def test_all_methods_of_a_logger_and_its_experiment_do_nothing():
    logger = Own()
    stand_in = silenced(logger)
    stand_in.log_metrics({"x": 1.0})
    stand_in.write("x")
    stand_in.experiment.watch()
    stand_in.experiment.table["x"] = 1.0
    stand_in.experiment.label = "x"
    stand_in.experiment.config.update(lr=2.0)
    assert stand_in.experiment.directory == Path("runs")
    assert stand_in.experiment.config["lr"] == 1.0
    assert "lr" in stand_in.experiment.config
    assert list(stand_in.experiment.config) == ["lr"]
    assert (len(stand_in.experiment.config), bool(stand_in.experiment.table)) == (1, False)
    assert (logger.written, logger.run.table, logger.run.config) == ([], {}, {"lr": 1.0})
    assert not hasattr(logger.run, "label")
    assert (stand_in.name, stand_in.version) == ("own", 3)
    with pytest.raises(AttributeError):
        stand_in.experiment.nothing  # noqa: B018


def test_attributes_that_are_set_on_a_stand_in_stay_there():
    logger = Own()
    silenced(logger).label = "x"
    assert not hasattr(logger, "label")


def test_the_dummy_of_a_dry_run_is_its_own_stand_in():
    logger = DummyLogger()
    assert silenced(logger) is logger
