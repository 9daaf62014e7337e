"""SharpnessMonitor in a real Trainer."""

import copy
import csv
import math
from collections import deque

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_ifthpo import BilevelLightningModule, SharpnessMonitor
from lightning_ifthpo.curvature import HessianOperator, mark_outputs
from tests.trainers import Classifier, loader, quiet_trainer, same, trained


class Plain(L.LightningModule):
    """A module that has never heard of this package; one batch an epoch."""

    def __init__(self, optimizer=torch.optim.SGD, **options):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
        self.optimizer, self.options = optimizer, {"lr": 0.1} | options

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(mark_outputs(self.net(x)), y)
        self.log("loss", loss)
        return {"loss": loss}

    def configure_optimizers(self):
        return self.optimizer(self.parameters(), **self.options)

    def train_dataloader(self):
        return loader(32, batch_size=32)


def monitor(**options):
    return SharpnessMonitor(
        **({"every_n_batches": 1, "max_overhead": None, "rtol": 1e-4, "max_iterations": 100} | options)
    )


def fit(module, callback, **options):
    """Trains with a monitor, and returns its metrics and the Trainer."""
    trainer = quiet_trainer(callbacks=[callback], **({"max_epochs": 3} | options))
    trainer.fit(module)
    return {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("sharpness/")}, trainer


def dense_hessian(module, batches=None, dtype=None):
    """The Hessian at the weights that training ended with, which the last measurement saw."""
    x, y = next(iter(module.train_dataloader())) if batches is None else batches
    x = x.to(next(module.parameters()).dtype)
    operator = HessianOperator(lambda: F.cross_entropy(module.net(x), y), list(module.parameters()))
    return operator.to_dense()


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
    assert metrics["sharpness/residual"] <= 1e-8 or curvature == "finite_difference"
    assert metrics["sharpness/edge"] == pytest.approx(20.0)
    assert metrics["sharpness/edge_ratio"] == pytest.approx(metrics["sharpness/lambda_max"] / 20.0)
    assert metrics["sharpness/failures"] == 0
    assert trainer.progress_bar_metrics["sharpness/lambda_max"] == pytest.approx(float(values[-1]), rel=1e-6)


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
        monitor(curvature=curvature, trace=True, spectral_density=curvature == "hessian", max_iterations=20),
        monitor(dataloader=examples, method="power_iteration", preconditioned=False, max_iterations=10),
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


def test_a_density_that_nobody_can_show_is_said_and_not_computed():
    with pytest.warns(UserWarning, match="no logger takes figures"):
        metrics, _ = fit(Plain(), monitor(spectral_density=True))
    assert metrics["sharpness/failures"] == 0
    assert metrics["sharpness/products"] <= 43  # what Lanczos takes at most of so few weights


def test_other_callbacks_can_monitor_it(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, monitor="sharpness/lambda_max", every_n_train_steps=1, save_top_k=2)
    stop = EarlyStopping("sharpness/edge_ratio", stopping_threshold=1e9, mode="min", check_on_train_epoch_end=True)
    trainer = quiet_trainer(callbacks=[monitor(), checkpoint, stop], max_epochs=3, enable_checkpointing=True)
    trainer.fit(Plain())
    assert float(checkpoint.best_model_score) > 0
    assert trainer.current_epoch == 1


GROUPS = [{"lr": 0.1}, {"lr": 0.01}]


class Grouped(Plain):
    def configure_optimizers(self):
        parts = [list(self.net[0].parameters()), list(self.net[2].parameters())]
        return self.optimizer([{"params": p} | group for p, group in zip(parts, GROUPS, strict=True)], **self.options)


@pytest.mark.parametrize(
    ("module", "metric", "edge"),
    [
        (lambda: Plain(momentum=0.9), None, 2 * 1.9 / 0.1),
        (lambda: Grouped(), lambda o, p: 0.1 if p.shape[0] == 3 else 1.0, 2 / 0.1),
        (
            lambda: Plain(torch.optim.Adam, lr=1e-3),
            lambda o, p: 1 / ((o.state[p]["exp_avg_sq"] / (1 - 0.999**3)).sqrt() + 1e-8),
            38 / 1e-3 * (1 - 0.9**3),
        ),
    ],
    ids=["heavy ball", "groups", "Adam"],
)
def test_the_edge_ratio_is_that_of_the_optimizer_in_use(module, metric, edge):
    """λ_max of the preconditioned Hessian, formed densely, over the edge; three steps."""
    module = module()
    metrics, trainer = fit(module, monitor(rtol=1e-8, max_iterations=60), precision="64-true")
    matrix = dense_hessian(module)
    if metric is not None:
        parts = [metric(trainer.optimizers[0], p) * torch.ones_like(p) for p in module.parameters()]
        root = torch.cat([part.detach().reshape(-1) for part in parts]).sqrt()
        matrix = root[:, None] * matrix * root
    largest = float(torch.linalg.eigvalsh(matrix)[-1])
    assert metrics["sharpness/lambda_max"] == pytest.approx(largest, rel=1e-6)
    assert metrics["sharpness/edge"] == pytest.approx(edge, rel=1e-6)
    assert metrics["sharpness/edge_ratio"] == pytest.approx(largest / edge, rel=1e-6)


def test_without_the_preconditioner_the_hessian_itself_is_measured():
    module = Plain(torch.optim.Adam, lr=1e-3)
    metrics, _ = fit(module, monitor(preconditioned=False, rtol=1e-8), precision="64-true")
    assert metrics["sharpness/lambda_max"] == pytest.approx(
        float(torch.linalg.eigvalsh(dense_hessian(module))[-1]), rel=1e-6
    )
    assert "sharpness/edge_ratio" not in metrics
    metrics, _ = fit(Plain(), monitor(preconditioned=False))
    assert metrics["sharpness/edge"] == pytest.approx(20.0)


def test_weight_decay_of_the_optimizer_brings_the_edge_nearer():
    module = Plain(weight_decay=0.5)
    metrics, _ = fit(module, monitor(rtol=1e-8), precision="64-true")
    largest = float(torch.linalg.eigvalsh(dense_hessian(module))[-1])
    assert metrics["sharpness/lambda_max"] == pytest.approx(largest, rel=1e-6)
    assert metrics["sharpness/edge_ratio"] == pytest.approx((largest + 0.5) / 20.0, rel=1e-6)


def test_an_optimizer_that_is_not_known_has_no_edge_and_is_named_once():
    with pytest.warns(UserWarning, match=r"stability edge of Rprop is not known") as caught:
        metrics, _ = fit(Plain(torch.optim.Rprop), monitor())
    assert len([w for w in caught if "Rprop" in str(w.message)]) == 1
    assert "sharpness/lambda_max" in metrics
    assert not {"sharpness/edge", "sharpness/edge_ratio"} & metrics.keys()
    with pytest.raises(
        ValueError, match=r"preconditioned=True needs an optimizer whose update is understood, and Rprop"
    ):
        fit(Plain(torch.optim.Rprop), monitor(preconditioned=True))
    fit(Plain(torch.optim.Rprop), monitor(preconditioned=False))  # without a warning, which would be an error


@pytest.mark.parametrize("precision", ["32", "bf16-mixed"])
def test_precision_of_the_trainer_costs_less_than_one_percent(precision):
    """On the weights that this very run has."""
    module = Plain()
    metrics, _ = fit(module, monitor(rtol=1e-3), precision=precision)
    exact = float(torch.linalg.eigvalsh(dense_hessian(module.double()))[-1])
    assert metrics["sharpness/lambda_max"] == pytest.approx(exact, rel=0.01)


class Attention(Plain):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, nhead=2, dim_feedforward=8, dropout=0.1, batch_first=True)

    def training_step(self, batch, batch_idx):
        x, y = batch
        x = self.layer(x[:, None, :].expand(-1, 3, -1))
        x = F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None])[:, 0]
        return F.cross_entropy(self.net(x.mean(1)), y)


class Compiled(Plain):
    def __init__(self):
        super().__init__()
        self.net = torch.compile(self.net, backend="aot_eager")


class Recurrent(Plain):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(1, 4, batch_first=True)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.net(self.lstm(x[..., None])[0][:, -1]), y)


@pytest.mark.filterwarnings("ignore:.*CUDA capability:UserWarning")
@pytest.mark.parametrize("module", [Attention, Compiled, Recurrent])
def test_what_has_no_second_derivative_is_replaced_for_the_measurement(module):
    metrics, _ = fit(module(), monitor(max_iterations=60, rtol=1e-2))
    assert metrics["sharpness/failures"] == 0
    assert metrics["sharpness/residual"] <= 1e-2


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


class Failing(Plain):
    """Fails in its second evaluation within a batch, which is the measurement."""

    def training_step(self, batch, batch_idx):
        if not self.trainer.loggers or type(self.trainer.loggers[0]).__name__ != "DummyLogger":
            return super().training_step(batch, batch_idx)
        self.net[0].eval()
        self.scratch = 1
        raise RuntimeError("cannot be evaluated twice")


def test_a_measurement_that_fails_is_told_once_counted_and_survived(tmp_path):
    module, callback = Failing(), monitor()
    with pytest.warns(UserWarning, match="training goes on: RuntimeError: cannot be evaluated twice") as caught:
        metrics, trainer = fit(module, callback, logger=CSVLogger(tmp_path))
    assert len([w for w in caught if "SharpnessMonitor" in str(w.message)]) == 1
    assert metrics == {"sharpness/failures": 3}
    assert trainer.global_step == 3
    assert module.net[0].training
    assert not hasattr(module, "scratch")
    assert isinstance(trainer.logger, CSVLogger)
    assert "log" not in vars(module)


def test_gauss_newton_without_outputs_says_what_to_do():
    class Unmarked(Plain):
        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.net(batch[0]), batch[1])

    with pytest.warns(UserWarning, match="call mark_outputs"):
        fit(Unmarked(), monitor(curvature="gauss_newton"))


def test_nan_weights_are_counted_and_never_logged():
    class Exploding(Plain):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            if self.trainer.current_epoch == 0:
                with torch.no_grad():
                    self.net[0].weight.fill_(torch.nan)

    values = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            values.append({k: float(v) for k, v in trainer.callback_metrics.items() if "sharpness" in k})

    trainer = quiet_trainer(callbacks=[monitor(), Watch()], max_epochs=3)
    with pytest.warns(UserWarning, match="NaN or infinity"):
        trainer.fit(Exploding())
    assert [value["sharpness/failures"] for value in values] == [0, 1, 2]
    assert all(math.isfinite(number) for value in values for number in value.values())


def test_a_linear_loss_has_curvature_zero():
    class Linear(Plain):
        def training_step(self, batch, batch_idx):
            return self.net[0](batch[0]).mean()

    metrics, _ = fit(Linear(), monitor())
    assert (metrics["sharpness/lambda_max"], metrics["sharpness/lambda_min"]) == (0.0, 0.0)
    assert (metrics["sharpness/residual"], metrics["sharpness/failures"]) == (0.0, 0.0)


def test_a_loss_that_no_weight_influences_is_reported():
    class Detached(BilevelLightningModule, Plain):
        def __init__(self):
            super().__init__()
            self.register_hyperparameter("unused", torch.zeros(()))

        def inner_loss(self, batch):
            return batch[0].mean()

        def val_dataloader(self):
            return loader(8)

        def validation_step(self, batch, batch_idx):
            pass

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.net(batch[0]), batch[1])

    with pytest.warns(UserWarning, match="the loss is detached"):
        fit(Detached(), monitor())


def test_measurements_that_do_not_converge_are_counted_at_the_end(caplog):
    with caplog.at_level("INFO"):
        metrics, _ = fit(Plain(), monitor(max_iterations=2, rtol=1e-6))
    assert metrics["sharpness/residual"] > 1e-6
    assert "3 of 3 measurements ended above rtol=1e-06" in caplog.text


class Frozen(Plain):
    def __init__(self):
        super().__init__()
        self.net.requires_grad_(False)
        self.configure_optimizers = lambda: None


class Empty(Dataset):
    def __len__(self):
        return 0

    def __getitem__(self, index):
        raise IndexError


@pytest.mark.parametrize(
    ("make", "options", "error", "message"),
    [
        (Frozen, {}, ValueError, "Frozen has no trainable parameters"),
        (
            Plain,
            {"top_k": 44, "max_iterations": 60},
            ValueError,
            "top_k=44 eigenvalues are asked for, and Plain has 43",
        ),
        (Plain, {"dataloader": []}, ValueError, "dataloader of SharpnessMonitor is empty"),
        (Plain, {"dataloader": DataLoader(Empty())}, ValueError, "dataloader of SharpnessMonitor is empty"),
        (Plain, {"dataloader": [torch.zeros(0, 4)]}, ValueError, "empty batch"),
        (Plain, {"dataloader": Empty()}, TypeError, "got Empty; wrap it in a DataLoader"),
        (Plain, {"dataloader": (torch.zeros(3, 4), torch.zeros(3))}, TypeError, "a single batch goes into a list"),
        (Plain, {"dataloader": 3}, TypeError, "expected one DataLoader, or a list of batches, got int"),
    ],
)
@pytest.mark.filterwarnings("ignore:`LightningModule.configure_optimizers` returned `None`")
def test_bad_input_is_refused_before_the_first_batch(make, options, error, message):
    with pytest.raises(error, match=message):
        fit(make(), monitor(**options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every_n_batches": 0}, "every_n_batches"),
        ({"method": "qr"}, "expected method to be one of"),
        ({"top_k": 0}, "k to be an integer >= 1"),
        ({"top_k": 2.0}, "k to be an integer"),
        ({"top_k": 2, "method": "power_iteration"}, "power iteration finds one eigenvalue at each end"),
        ({"curvature": "fisher"}, "expected curvature to be one of"),
        ({"max_iterations": 1}, "max_iterations to be an integer >= 2"),
        ({"rtol": -1.0}, "0 < rtol"),
        ({"rtol": math.inf}, "rtol < infinity"),
        ({"max_overhead": 0.0}, "max_overhead > 0"),
    ],
    ids=str,
)
def test_the_constructor_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        SharpnessMonitor(**options)


def test_a_picture_needs_matplotlib(monkeypatch):
    monkeypatch.setattr("lightning_ifthpo.callbacks.sharpness.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install"):
        SharpnessMonitor(spectral_density=True)


@pytest.mark.parametrize(
    ("options", "trainer_options", "expected"),
    [
        ({"every_n_batches": 3}, {}, [3, 6, 9, 12]),
        ({"every_n_batches": 5}, {}, [4, 9]),  # after the first epoch at the latest
        ({"every_n_batches": 1}, {"accumulate_grad_batches": 2}, [2, 4, 6, 8, 10, 12]),
        ({"every_n_batches": 5}, {"fast_dev_run": True}, [1]),
        ({"every_n_batches": 1, "max_overhead": 1e-9}, {}, [1, 2]),  # the first is not counted
    ],
    ids=str,
)
def test_it_fires_when_due(options, trainer_options, expected):
    fired = []

    class Spy(SharpnessMonitor):
        def _fire(self, trainer, module, batch):
            fired.append(trainer.fit_loop.total_batch_idx + 1)
            return super()._fire(trainer, module, batch)

    trained([Spy(**({"max_overhead": None, "rtol": 0.1} | options))], **trainer_options)
    assert fired == expected


def test_it_resumes_where_it_was(tmp_path):
    """Cadence, count of failures and warm start: what is logged after resuming is what would have been logged."""

    def run(epochs, resume=None):
        torch.manual_seed(1)
        callback = monitor(every_n_batches=2)
        rows = []

        class Watch(Callback):
            def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
                rows.append({k: float(v) for k, v in trainer.callback_metrics.items() if "sharpness" in k})

        trainer = quiet_trainer(callbacks=[callback, Watch()], max_epochs=epochs)
        trainer.fit(Plain(momentum=0.9), ckpt_path=resume)
        trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return rows, callback

    whole, _ = run(8)
    run(5)
    rest, callback = run(8, resume=tmp_path / "5.ckpt")
    assert {} not in whole  # an epoch has one batch, and the first measurement is made after the first epoch
    assert rest == [{}, *whole[6:]]  # after batch 6 there is none
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
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback],
    )
    trainer.fit(Module(), loader())
    assert float(trainer.callback_metrics["sharpness/edge_ratio"]) > 0
    assert callback.failures == 0


class InPlace(Plain):
    """Changes all sorts of things in its training step that are no registered state."""

    def __init__(self):
        super().__init__()
        self.momentum_encoder = nn.Linear(4, 5)
        self.momentum_encoder.requires_grad_(False)
        self.generator, self.numpy_generator = torch.Generator().manual_seed(1), np.random.default_rng(1)
        self.outputs, self.counter, self.seen, self.recent = [], {"n": 0}, set(), deque(maxlen=3)
        self.moving = torch.zeros(3)
        self.register_buffer("buffer", torch.zeros(2))
        self.view = self.buffer[:1]
        self.scripted = torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))

    def training_step(self, batch, batch_idx):
        x, y = batch
        with torch.no_grad():
            for slow, fast in zip(self.momentum_encoder.parameters(), self.net[0].parameters(), strict=True):
                slow.mul_(0.9).add_(fast, alpha=0.1)
            self.net[2].weight.mul_(0.99)
            self.net[2].bias.data = self.net[2].bias.data + 0.01
            self.moving += y.float().mean()
            self.view += 1
        self.momentum_encoder.bias.requires_grad_(not self.momentum_encoder.bias.requires_grad)
        self.counter["n"] += 1
        self.seen.add(len(self.seen))
        noise = torch.randn(x.shape, generator=self.generator) + self.numpy_generator.normal()
        x = self.scripted(x) + 0.1 * noise * self.counter["n"] + self.momentum_encoder(x).mean() + self.moving.mean()
        loss = F.cross_entropy(self.net(x), y)
        self.outputs.append(loss.detach())
        self.recent.append(len(self.outputs))
        return loss

    def state(self):
        tensors = [*self.state_dict().values(), self.moving, self.view, *self.outputs, self.generator.get_state()]
        numbers = [self.counter, len(self.seen), list(self.recent), self.momentum_encoder.bias.requires_grad]
        return [t.clone() for t in tensors], copy.deepcopy(numbers), self.numpy_generator.bit_generator.state


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_what_a_training_step_does_in_place_is_undone():
    states = []
    for callbacks in ([monitor(rtol=0.1)], []):
        torch.manual_seed(5)
        module = InPlace()
        trainer = quiet_trainer(callbacks=callbacks, max_epochs=4)
        trainer.fit(module)
        states.append(module.state())
        assert float(trainer.callback_metrics.get("sharpness/failures", 0)) == 0
    assert same(*states)


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


def test_at_a_learning_rate_of_zero_the_metric_stays_and_nothing_is_unstable():
    module = Plain(torch.optim.Adam, lr=1e-3)
    rates = [1e-3, 1e-3, 0.0]
    module.on_train_batch_start = lambda *_: module.optimizers().param_groups[0].update(lr=rates.pop(0))
    values = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            values.append({k: float(v) for k, v in trainer.callback_metrics.items()})

    trainer = quiet_trainer(callbacks=[monitor(), Watch()], max_epochs=3)
    trainer.fit(module)
    # Adam's preconditioner changes by a few percent in a step, and is about a hundred
    assert values[2]["sharpness/lambda_max"] > 0.2 * values[1]["sharpness/lambda_max"]
    assert values[2]["sharpness/edge_ratio"] == 0.0
    assert values[2]["sharpness/edge"] == values[1]["sharpness/edge"]  # the last finite one


def test_an_optimizer_that_maximizes_has_no_edge():
    class Maximizing(Plain):
        def training_step(self, batch, batch_idx):
            return -super().training_step(batch, batch_idx)["loss"]

    with pytest.warns(UserWarning, match="stability edge of SGD is not known"):
        metrics, _ = fit(Maximizing(maximize=True), monitor())
    assert "sharpness/edge_ratio" not in metrics


def test_half_precision_has_a_trace():
    metrics, _ = fit(Classifier(), monitor(trace=True, rtol=0.1), precision="bf16-true")
    assert metrics["sharpness/failures"] == 0
    assert math.isfinite(metrics["sharpness/trace"])


def test_a_picture_that_fails_costs_nothing_else(monkeypatch, tmp_path):
    def fails(*arguments, **options):
        raise OSError("no space left")

    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.add_figure", fails)
    callback = monitor(spectral_density=True)
    with pytest.warns(UserWarning, match="OSError: no space left"):
        metrics, _ = fit(Plain(), callback, logger=TensorBoardLogger(tmp_path))
    assert metrics["sharpness/lambda_max"] > 0
    assert callback.failures == 3  # and it was tried again


def test_manual_optimization_with_optimizers_of_its_own_is_measured():
    class Manual(Plain):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.inner_loss = lambda batch: F.cross_entropy(self.net(batch[0]), batch[1])

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers(use_pl_optimizer=False)
            optimizer.zero_grad()
            self.inner_loss(batch).backward()
            optimizer.step()

    metrics, _ = fit(Manual(), monitor())
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


def test_complex_weights_are_refused():
    class Complex(Plain):
        def __init__(self):
            super().__init__()
            self.phase = nn.Parameter(torch.zeros(2, dtype=torch.complex64))

    with pytest.raises(ValueError, match="Complex has complex weights"):
        fit(Complex(), monitor())


def test_finite_differences_below_float32_are_refused():
    with pytest.raises(ValueError, match="curvature='finite_difference' needs float32"):
        fit(Plain(), monitor(curvature="finite_difference"), precision="bf16-true")


def test_examples_that_cannot_be_counted_are_refused():
    with pytest.raises(ValueError, match="cannot tell the number of examples in a batch of type object"):
        fit(Plain(), monitor(dataloader=[object()]))


def test_the_budget_is_told_when_it_cuts(caplog):
    with caplog.at_level("INFO"):
        trained([monitor(max_overhead=1e-9)])
    assert "measured 2 times, more rarely than every 1 batches, to stay below max_overhead=1e-09" in caplog.text
