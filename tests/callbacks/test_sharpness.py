"""SharpnessMonitor in a real Trainer."""

import csv
import math

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tests.helpers.monitored import OwnOptimizer, Plain, dense_hessian, fit, monitor
from tests.helpers.trainers import ACCELERATOR, Classifier, loader, quiet_trainer, same, trained


@pytest.mark.parametrize("method", ["lanczos", "power_iteration"])
@pytest.mark.parametrize("curvature", ["hessian", "finite_difference"])
def test_it_logs_both_ends_of_the_spectrum(method, curvature):
    """The bound is 1e-8 of λ_max, and values err by its square at most; differences of gradients by 1e-9."""
    module = Plain()
    options = {"method": method, "curvature": curvature, "rtol": 1e-8, "max_iterations": 500}
    metrics, trainer = fit(module, monitor(**options), precision="64-true")
    values = torch.linalg.eigvalsh(dense_hessian(module))
    assert metrics["sharpness/lambda_max"] == pytest.approx(float(values[-1]), rel=1e-6)
    assert metrics["sharpness/lambda_min"] == pytest.approx(float(values[0]), rel=1e-6)
    # power iteration by differences of gradients ends in their noise; 1.4e-4 was measured
    noisy = (method, curvature) == ("power_iteration", "finite_difference")
    assert metrics["sharpness/residual"] <= (1e-3 if noisy else 1e-8)
    assert metrics["sharpness/edge"] == pytest.approx(20.0)
    assert metrics["sharpness/edge_ratio"] == pytest.approx(metrics["sharpness/lambda_max"] / 20.0)
    assert metrics["sharpness/failures"] == 0
    assert trainer.progress_bar_metrics["sharpness/max"] == pytest.approx(float(values[-1]), rel=1e-6)


def test_top_k_and_the_trace():
    module = Plain()
    metrics, _ = fit(module, monitor(top_k=3, trace=True, rtol=1e-8), precision="64-true")
    matrix = dense_hessian(module)
    values = torch.linalg.eigvalsh(matrix).flip(0)
    found = [metrics[f"sharpness/lambda_{rank}"] for rank in ("max", 2, 3)]
    assert found == pytest.approx(values[:3].tolist(), rel=1e-6)
    # 43 weights: within 60 products the trace is exact
    assert metrics["sharpness/trace"] == pytest.approx(float(matrix.trace()), rel=1e-6)
    assert metrics["sharpness/trace_error"] == 0.0


def test_gauss_newton_curvature_is_positive():
    metrics, _ = fit(Plain(), monitor(curvature="gauss_newton"))
    assert metrics["sharpness/lambda_min"] > -1e-6
    assert metrics["sharpness/failures"] == 0


@pytest.mark.parametrize("sizes", [[32], [7, 20, 5], [1] * 32], ids=["one batch", "uneven", "single examples"])
def test_fixed_examples_are_weighted_one_by_one(sizes):
    """Whatever the batches, it is the curvature of the mean loss over all examples."""
    x, y = next(iter(loader(32, batch_size=32, seed=5)))
    batches = list(zip(x.split(sizes), y.split(sizes), strict=True))
    module = Plain()
    metrics, _ = fit(module, monitor(dataloader=batches, rtol=1e-8), precision="64-true")
    values = torch.linalg.eigvalsh(dense_hessian(module, (x, y)))
    assert metrics["sharpness/lambda_max"] == pytest.approx(float(values[-1]), rel=1e-6)
    assert metrics["sharpness/lambda_min"] == pytest.approx(float(values[0]), rel=1e-6)


def test_fixed_examples_are_prepared_like_validation_data_and_dropout_draws_the_same_masks():
    class Prepared(Plain):
        def __init__(self):
            super().__init__(lr=0.0)
            self.net = nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5), nn.Linear(5, 3))

        def on_after_batch_transfer(self, batch, dataloader_idx):
            x, y = batch
            return (x + 1.0 if self.trainer.training else x), y

    values = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            values.append(float(trainer.callback_metrics["sharpness/lambda_max"]))

    examples = DataLoader(TensorDataset(*next(iter(loader(20, batch_size=20)))), batch_size=6, shuffle=True)
    trainer = quiet_trainer(callbacks=[monitor(dataloader=examples, rtol=1e-6), Watch()], max_epochs=4)
    trainer.fit(Prepared())
    assert values == pytest.approx([values[0]] * 4, rel=1e-4)  # the weights rest, the starts differ


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{}, {"accumulate_grad_batches": 3, "gradient_clip_val": 0.1}, {"precision": "bf16-mixed"}],
    ids=["plain", "accumulated and clipped", "bf16-mixed"],
)
@pytest.mark.parametrize("curvature", ["hessian", "finite_difference"])
def test_an_observer_leaves_no_trace(curvature, options, tmp_path):
    """Weights, buffers, gradients, modes, random state, metrics, other logged values and a rebound attribute."""
    examples = loader(20, batch_size=8, seed=3)
    observer = [
        monitor(curvature=curvature, trace=True, spectral_density=curvature == "hessian", max_iterations=6),
        monitor(dataloader=examples, method="power_iteration", preconditioned=False, max_iterations=4),
    ]
    module, _, observed = trained(observer, logger=TensorBoardLogger(tmp_path), **options)
    plain_module, _, plain = trained([], logger=TensorBoardLogger(tmp_path), **options)
    assert same(observed.batches, plain.batches)
    assert same(observed.logged, plain.logged)
    assert module.evaluations == plain_module.evaluations
    assert [callback.failures for callback in observer] == [0, 0]


def read_csv(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_metrics_are_logged_once_at_their_step_to_all_loggers(tmp_path):
    loggers = [CSVLogger(tmp_path, name="csv"), TensorBoardLogger(tmp_path, name="tb")]
    fit(Plain(), monitor(every_n_batches=2, max_iterations=20), logger=loggers, max_epochs=6)
    rows = [row for row in read_csv(tmp_path / "csv" / "version_0" / "metrics.csv") if row.get("sharpness/lambda_max")]
    assert [int(row["step"]) for row in rows] == [0, 2, 4]
    names = ("lambda_max", "lambda_min", "edge", "edge_ratio", "residual", "products", "failures")
    assert all(math.isfinite(float(row[f"sharpness/{name}"])) for row in rows for name in names)

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tb" / "version_0"))
    events.Reload()
    assert [event.step for event in events.Scalars("sharpness/edge_ratio")] == [0, 2, 4]


def test_the_spectral_density_is_pictured_once_an_epoch(tmp_path):
    callback = monitor(spectral_density=True)
    module = Classifier()
    trainer = quiet_trainer(callbacks=[callback], max_epochs=3, logger=TensorBoardLogger(tmp_path))
    trainer.fit(module)

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(trainer.logger.log_dir, size_guidance={"images": 0})
    events.Reload()
    images = events.Images("sharpness/spectral_density")
    assert [image.step for image in images] == [0, 4, 8]
    assert all(image.width > 300 and len(image.encoded_image_string) > 3000 for image in images)
    assert callback.failures == 0


def test_other_callbacks_can_monitor_it(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, monitor="sharpness/lambda_max", every_n_train_steps=1, save_top_k=2)
    stop = EarlyStopping("sharpness/edge_ratio", stopping_threshold=1e9, mode="min", check_on_train_epoch_end=True)
    trainer = quiet_trainer(callbacks=[monitor(), checkpoint, stop], max_epochs=3, enable_checkpointing=True)
    trainer.fit(Plain())
    assert float(checkpoint.best_model_score) > 0
    assert trainer.current_epoch == 1


@pytest.mark.parametrize("precision", ["32", "bf16-mixed"])
def test_precision_of_the_trainer_costs_less_than_one_percent(precision):
    """On the weights that this very run has."""
    module = Plain()
    metrics, _ = fit(module, monitor(rtol=1e-3), precision=precision)
    exact = float(torch.linalg.eigvalsh(dense_hessian(module.double()))[-1])
    assert metrics["sharpness/lambda_max"] == pytest.approx(exact, rel=0.01)


def test_manual_optimization_is_measured_by_its_inner_loss():
    class Manual(Plain):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(self.inner_loss(batch) if hasattr(self, "inner_loss") else self.net(batch[0]).sum())
            optimizer.step()

    class WithLoss(Manual):
        def inner_loss(self, batch):
            return F.cross_entropy(self.net(batch[0]), batch[1])

    metrics, _ = fit(WithLoss(), monitor())
    assert metrics["sharpness/failures"] == 0
    with pytest.raises(ValueError, match=r"Manual optimizes manually.*define inner_loss"):
        fit(Manual(), monitor())


def test_a_linear_loss_has_curvature_zero():
    class Linear(Plain):
        def training_step(self, batch, batch_idx):
            return self.net[0](batch[0]).mean()

    metrics, _ = fit(Linear(), monitor())
    assert (metrics["sharpness/lambda_max"], metrics["sharpness/lambda_min"]) == (0.0, 0.0)
    assert (metrics["sharpness/residual"], metrics["sharpness/failures"]) == (0.0, 0.0)


def test_it_resumes_where_it_was(tmp_path):
    """Cadence, count of failures and warm start: what is logged after resuming is what would have been logged."""

    def run(epochs, resume=None):
        torch.manual_seed(1)
        callback = monitor(every_n_batches=2)
        rows = []

        class Watch(Callback):
            def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
                metrics = {k: float(v) for k, v in trainer.callback_metrics.items() if "sharpness" in k}
                metrics.pop("sharpness/max", None)  # the progress bar's name, which comes with a measurement
                rows.append(metrics)

        trainer = quiet_trainer(callbacks=[callback, Watch()], max_epochs=epochs)
        trainer.fit(Plain(momentum=0.9), ckpt_path=resume)
        trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return rows, callback

    whole, _ = run(8)
    run(5)
    rest, callback = run(8, resume=tmp_path / "5.ckpt")
    assert {} not in whole  # an epoch has one batch, and the first measurement is made after the first epoch
    assert rest == whole[5:]
    state = torch.load(tmp_path / "8.ckpt", weights_only=True)["callbacks"][callback.state_key]
    assert state["tracker"]["measurements"] == 4


def test_a_second_fit_begins_anew():
    callback = monitor()
    fit(Plain(), callback)
    fit(Plain(), callback)
    assert callback.state_dict()["tracker"]["measurements"] == 3


def test_two_monitors_have_names_and_states_of_their_own(tmp_path):
    examples = [next(iter(loader(12, batch_size=12, seed=9)))]
    first, second = monitor(), monitor(dataloader=examples, name="held_out")
    trainer = quiet_trainer(callbacks=[first, second], max_epochs=2)
    trainer.fit(Plain())
    metrics = trainer.callback_metrics
    assert metrics["sharpness/lambda_max"] != metrics["held_out/lambda_max"]
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    states = torch.load(tmp_path / "two.ckpt", weights_only=True)["callbacks"]
    assert not torch.equal(states[first.state_key]["tracker"]["last"], states[second.state_key]["tracker"]["last"])


def test_it_serves_pytorch_lightning_too():
    pl = pytest.importorskip("pytorch_lightning")

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(4, 3)

        def training_step(self, batch):
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    callback = monitor()
    trainer = pl.Trainer(
        max_epochs=1,
        **ACCELERATOR,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback],
    )
    trainer.fit(Module(), loader())
    assert float(trainer.callback_metrics["sharpness/edge_ratio"]) > 0
    assert callback.failures == 0


def test_fixed_examples_outlive_a_transfer_hook_that_changes_them():
    class Halving(Plain):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            batch[0].mul_(0.5)
            return batch

    x, y = next(iter(loader(32, batch_size=32, seed=5)))
    for batches in ([(x, y)], [(x[:10], y[:10]), (x[10:], y[10:])]):
        module = Halving(lr=0.0)
        metrics, _ = fit(module, monitor(dataloader=batches, rtol=1e-8), precision="64-true")
        expected = torch.linalg.eigvalsh(dense_hessian(module, (x * 0.5, y)))[-1]
        assert metrics["sharpness/lambda_max"] == pytest.approx(float(expected), rel=1e-6)


def test_the_batch_is_measured_as_it_came():
    """Although the training step takes it apart and changes it."""

    class Greedy(Plain):
        def training_step(self, batch, batch_idx):
            y = batch.pop("y")
            batch["x"].mul_(0.3)
            return F.cross_entropy(self.net(batch.pop("x")), y)

        def train_dataloader(self):
            x, y = next(iter(super().train_dataloader()))
            return DataLoader([{"x": x, "y": y}], batch_size=None)

    module = Greedy(lr=0.0)
    x, y = next(iter(loader(32, batch_size=32)))
    metrics, _ = fit(module, monitor(rtol=1e-8), precision="64-true", max_epochs=1)
    expected = torch.linalg.eigvalsh(dense_hessian(module, (0.3 * x, y)))[-1]
    assert metrics["sharpness/lambda_max"] == pytest.approx(float(expected), rel=1e-6)
    assert metrics["sharpness/failures"] == 0


def test_half_precision_has_a_trace():
    metrics, _ = fit(Classifier(), monitor(trace=True, rtol=0.1), precision="bf16-true")
    assert metrics["sharpness/failures"] == 0
    assert math.isfinite(metrics["sharpness/trace"])


def test_manual_optimization_with_optimizers_of_its_own_is_measured():
    metrics, _ = fit(OwnOptimizer(), monitor())
    assert metrics["sharpness/lambda_max"] > 0


def test_a_criterion_that_is_called_inner_loss_is_none():
    class Named(Plain):
        def __init__(self):
            super().__init__()
            self.inner_loss = nn.CrossEntropyLoss()

        def training_step(self, batch, **kwargs):
            return self.inner_loss(self.net(batch[0]), batch[1])

    metrics, _ = fit(Named(), monitor())
    assert metrics["sharpness/failures"] == 0


def test_the_budget_is_told_when_it_cuts(caplog):
    with caplog.at_level("INFO"):
        trained([monitor(max_overhead=1e-9)])
    assert "measured once, more rarely than every 1 batches, to stay below max_overhead=1e-09; for a" in caplog.text
