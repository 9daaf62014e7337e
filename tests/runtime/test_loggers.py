"""What each logger has written is read back: the values that were measured, at their steps, and figures."""

import contextlib
import csv
import io
import json
import time

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import DummyLogger
from matplotlib.figure import Figure
from PIL import Image

from lightning_ifthpo import ExactGeN, IFTHypergradient, SharpnessMonitor
from lightning_ifthpo.runtime.loggers import log_figure, log_metrics, takes_figures
from tests.helpers.trainers import Classifier, during_training, quiet_trainer

WATCHED = ("hypergrad/norm", "hyperparameter/decay/mean", "sharpness/lambda_max", "gen/lr")


BLOCK = 32768  # of a file of Weights & Biases


def read_csv(folder):
    (file,) = folder.rglob("metrics.csv")
    rows = list(csv.DictReader(file.read_text().splitlines()))
    return {name: [(int(row["step"]), float(row[name])) for row in rows if row.get(name)] for name in WATCHED}, []


def read_tensorboard(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (file,) = folder.rglob("events.out.tfevents*")
    events = EventAccumulator(str(file), size_guidance={"images": 0, "scalars": 0})
    events.Reload()
    scalars = {name: [(event.step, event.value) for event in events.Scalars(name)] for name in WATCHED}
    return scalars, [image.encoded_image_string for image in events.Images("sharpness/spectral_density")]


def read_mlflow(folder):
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"file:{folder}")
    (experiment,) = (found for found in client.search_experiments() if found.name != "Default")
    (run,) = client.search_runs([experiment.experiment_id])
    history = {name: client.get_metric_history(run.info.run_id, name) for name in WATCHED}
    scalars = {name: [(metric.step, metric.value) for metric in metrics] for name, metrics in history.items()}
    return scalars, [file.read_bytes() for file in sorted(folder.rglob("sharpness/spectral_density/*.png"))]


def read_wandb(folder):
    """By hand, since the library writes such files and only its server reads them."""
    (file,) = folder.rglob("run-*.wandb")
    scalars = {name: [] for name in WATCHED}
    for record in finished_wandb_records(file):
        items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for name in scalars.keys() & items.keys():
            scalars[name].append((items["trainer/global_step"], items[name]))
    return scalars, [image.read_bytes() for image in sorted(folder.rglob("media/images/sharpness/*.png"))]


def finished_wandb_records(file, patience=20.0):
    """Waits for the process that writes the file, which goes on for a moment after the run has been finished."""
    from google.protobuf.message import DecodeError
    from wandb.proto import wandb_internal_pb2

    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        with contextlib.suppress(DecodeError):  # of half a record
            records = [wandb_internal_pb2.Record.FromString(data) for data in wandb_records(file.read_bytes())]
            if any(record.HasField("exit") for record in records):
                return records
        time.sleep(0.05)
    raise TimeoutError(f"{file} was not finished in {patience} seconds")


def wandb_records(content):
    """Records in LevelDB's log format: chunks with a checksum, a length and a type, which do not cross blocks."""
    position, record = 7, b""  # after the header of the file
    while position + 7 <= len(content):
        left = BLOCK - position % BLOCK
        if left < 7:
            position += left
            continue
        length, kind = int.from_bytes(content[position + 4 : position + 6], "little"), content[position + 6]
        position += 7
        record += content[position : position + length]
        position += length
        if kind in (1, 4):  # whole, or the last part of one
            yield record
            record = b""


class Measured(Callback):
    """Notes what the callbacks before it have measured last, at each step."""

    def __init__(self):
        self.values = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.values.append({name: float(value) for name, value in trainer.callback_metrics.items()})


LOGGERS = {
    "CSV": (CSVLogger, read_csv),
    "TensorBoard": (TensorBoardLogger, read_tensorboard),
    "Weights & Biases": (lambda folder: WandbLogger(save_dir=folder, offline=True), read_wandb),
    "MLflow": (lambda folder: MLFlowLogger(tracking_uri=f"file:{folder}"), read_mlflow),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:spectral_density=True, but no logger takes figures")
@pytest.mark.filterwarnings("ignore:Field .model_name. has conflict")  # MLflow with pydantic 2.7
@pytest.mark.parametrize("name", LOGGERS)
def test_what_is_logged_can_be_read_back(name, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # which prefers data bases
    monkeypatch.setenv("WANDB_SILENT", "true")
    make, read = LOGGERS[name]
    torch.manual_seed(0)
    measured = Measured()
    monitor = SharpnessMonitor(3, spectral_density=True, max_overhead=None)
    trainer = quiet_trainer(
        callbacks=[IFTHypergradient(2), monitor, ExactGeN(2), measured], logger=make(tmp_path), max_epochs=2
    )
    trainer.fit(Classifier())
    if name == "Weights & Biases":
        trainer.logger.experiment.finish()
    scalars, figures = read(tmp_path)
    assert [step for step, _ in scalars["hypergrad/norm"]] == [1, 3, 5, 7]
    assert [step for step, _ in scalars["sharpness/lambda_max"]] == [2, 5]
    assert len(scalars["gen/lr"]) >= 4
    for key, values in scalars.items():
        assert values == [(step, pytest.approx(measured.values[step][key], rel=1e-6)) for step, _ in values]
    assert len(figures) == (0 if name == "CSV" else 2)  # one an epoch
    for figure in figures:
        image = Image.open(io.BytesIO(figure)).convert("L")
        assert image.width > 300
        assert len(image.getcolors()) > 20  # there is something on it


class Notes(DummyLogger):
    """Notes what it is given."""

    def __init__(self):
        super().__init__()
        self.logged = []

    def log_metrics(self, metrics, step=None):
        self.logged.append((metrics, step))


def test_metrics_reach_every_logger_once_the_callbacks_and_the_progress_bar():
    loggers = [Notes(), Notes()]

    def action(trainer, module):
        log_metrics(trainer, module, {"a/b": 1.5, "a/c": 2.0}, headlines={"a/b": "b"})

    trainer = during_training(action, logger=loggers)
    for logger in loggers:
        assert [entry for entry in logger.logged if "a/b" in entry[0]] == [({"a/b": 1.5, "a/c": 2.0}, 0)]
    assert float(trainer.callback_metrics["a/c"]) == 2.0
    assert trainer.progress_bar_metrics["b"] == 1.5
    assert not trainer.progress_bar_metrics.keys() & {"a/b", "a/c"}
    assert float(trainer.callback_metrics["a/b"]) == 1.5


def test_without_its_headlines_the_others_are_logged():
    logger = Notes()
    trainer = during_training(lambda *both: log_metrics(*both, {"a/c": 2.0}, headlines={"a/b": "b"}), logger=logger)
    assert ({"a/c": 2.0}, 0) in logger.logged
    assert "b" not in trainer.progress_bar_metrics


def test_figures_go_to_those_that_take_them(tmp_path):
    csv_logger, tensorboard = CSVLogger(tmp_path), TensorBoardLogger(tmp_path)
    assert [takes_figures(logger) for logger in (csv_logger, tensorboard)] == [False, True]
    figure = Figure(figsize=(1, 1))
    during_training(lambda trainer, _: log_figure(trainer, "figure", figure), logger=[csv_logger, tensorboard])
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(tensorboard.log_dir, size_guidance={"images": 0})
    events.Reload()
    assert [image.step for image in events.Images("figure")] == [0]
