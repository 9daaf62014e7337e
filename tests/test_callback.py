"""IFTHypergradient in a real Trainer."""

import copy
import csv
import math
import pickle

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_ifthpo import BilevelLightningModule, IFTHypergradient
from lightning_ifthpo.callbacks.hyper_step import HyperStepper
from lightning_ifthpo.hyperparameters import WeightDecay
from lightning_ifthpo.solvers import Amortized, ConjugateGradient, Direct, Identity, Neumann
from tests.problems import relative_error
from tests.trainers import Classifier, Ridge, loader, quiet_trainer, same, trained


@pytest.mark.filterwarnings("ignore:hyper step .* ended with status 'negative_curvature'")
@pytest.mark.parametrize("curvature", ["hessian", "gauss_newton", "gradient_outer_product", "finite_difference"])
@pytest.mark.parametrize(
    "options", [{}, {"accumulate_grad_batches": 3, "gradient_clip_val": 0.1}], ids=["plain", "accumulated and clipped"]
)
def test_training_is_bit_identical_with_the_hyper_step_disabled(curvature, options):
    """Weights, buffers, gradients, modes, random state, metrics, logged values and a rebound attribute."""
    disabled = IFTHypergradient(every_n_batches=1, curvature=curvature, on_failure="use")
    with_callback, _, observed = trained([disabled], lambda: Classifier(hyper_lr=0.0), **options)
    without, _, plain = trained([], **options)
    assert same(observed.batches, plain.batches)
    assert same(observed.logged, plain.logged)
    assert with_callback.evaluations == without.evaluations
    assert disabled._stepper.steps == (12 if not options else 6)


def test_only_hyperparameters_change_and_they_do():
    module, _, _ = trained([IFTHypergradient(every_n_batches=2)])
    decays = torch.stack([d.reshape(()) for d in module.decay.decays()])
    assert not torch.allclose(decays, torch.full_like(decays, 0.01), rtol=1e-2)
    assert all(p.grad is None and not p.requires_grad for p in module.hyperparameters())


@pytest.mark.parametrize("curvature", ["auto", "hessian", "gauss_newton", "finite_difference"])
def test_ridge_takes_a_step_along_its_closed_form(curvature):
    """300 full-batch steps to the minimum, then one hyper step of gradient descent with learning rate one."""
    module = Ridge()
    solver = ConjugateGradient(max_iterations=50, rtol=1e-12)
    callback = IFTHypergradient(1, curvature=curvature, solver=solver, start_after_batches=299)
    quiet_trainer(max_epochs=300, callbacks=[callback]).fit(module)
    start = torch.tensor(-1.0, dtype=torch.float64)
    moved = start - module.log_decay
    # exact products: rounding; finite differences: 1e-10 through the condition number
    tolerance = 1e-6 if curvature == "finite_difference" else 1e-10
    assert relative_error(moved.reshape(1), module.closed_form(start).reshape(1)) < tolerance


class RidgeLayer(Ridge):
    """The same, with its weights in a layer, which KFAC can find."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 1, bias=False, dtype=torch.float64)
        self.layer.weight = nn.Parameter(self.w.detach()[None])
        del self.w

    def inner_loss(self, batch):
        x, y = batch
        penalty = self.log_decay.exp() * self.layer.weight.square().sum() / 2
        return (self.mark_outputs(self.layer(x))[:, 0] - y).square().mean() / 2 + penalty

    def outer_loss(self, batch):
        x, y = batch
        return (self.layer(x)[:, 0] - y).square().mean() / 2


def test_kfac_with_the_penalty_as_damping_takes_the_same_step():
    """KFAC does not see the penalty, and is exact otherwise."""
    module = RidgeLayer()
    start = torch.tensor(-1.0, dtype=torch.float64)
    solver = Direct(damping=float(start.exp()))
    callback = IFTHypergradient(1, curvature="kfac", solver=solver, start_after_batches=299)
    quiet_trainer(max_epochs=300, callbacks=[callback]).fit(module)
    moved = start - module.log_decay
    assert relative_error(moved.reshape(1), module.closed_form(start).reshape(1)) < 1e-10


@pytest.mark.parametrize("curvature", ["kfac", "gradient_outer_product"])
@pytest.mark.parametrize("solver", [None, Direct(damping="horizon")], ids=["amortized", "direct"])
def test_closed_forms_serve_an_adaptive_optimizer(curvature, solver):
    """Whose preconditioner makes the damping another one for each weight."""
    module = Classifier(optimizer="AdamW")
    module.net[1].requires_grad_(False)  # BatchNorm, which KFAC does not know
    callback = IFTHypergradient(1, curvature=curvature, solver=solver, on_failure="raise")
    quiet_trainer(max_epochs=2, callbacks=[callback]).fit(module)
    assert callback.skipped == 0
    assert all(decay.item() != pytest.approx(0.01, rel=1e-3) for decay in module.decay.decays()[:2])


@pytest.mark.parametrize(("horizon", "tolerance"), [(10_000, 0.03), (100, 0.2)])
def test_the_amortized_solver_finds_the_best_decay_of_ridge(horizon, tolerance):
    """A finite horizon sees less of the slow directions, and so ends near the optimum rather than on it."""
    module = Ridge()
    module.configure_hyper_optimizer = lambda: torch.optim.Adam(module.hyperparameters(), lr=0.01)
    quiet_trainer(max_epochs=3000, callbacks=[IFTHypergradient(5, solver=Amortized(horizon=horizon))]).fit(module)
    grid = torch.linspace(-4, 2, 601, dtype=torch.float64)
    slopes = torch.stack([module.closed_form(point) for point in grid])
    assert abs(module.log_decay - grid[(slopes > 0).nonzero()[0, 0]]) < tolerance


def fired_batches(every, batches=12, **options):
    trainer_options = options.pop("trainer", {})
    fired = []

    class Spy(IFTHypergradient):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            before = self._stepper.steps
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
            if self._stepper.steps > before:
                fired.append(trainer.fit_loop.total_batch_idx + 1)

    trained([Spy(every, **options)], max_epochs=batches // 4, **trainer_options)
    return fired


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"every": 1}, list(range(1, 13))),
        ({"every": 5}, [5, 10]),
        ({"every": 5, "start_after_batches": 3}, [8]),
        ({"every": 1, "trainer": {"accumulate_grad_batches": 2}}, [2, 4, 6, 8, 10, 12]),
        ({"every": 3, "trainer": {"accumulate_grad_batches": 2}}, [4, 8, 12]),
        ({"every": 5, "trainer": {"fast_dev_run": True}}, [1]),
        ({"every": 1, "max_overhead": 1e-9}, [1, 2]),  # the first is not counted
    ],
    ids=str,
)
def test_it_fires_when_due(arguments, expected):
    assert fired_batches(**arguments) == expected


def read_csv(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_metrics_are_logged_once_at_their_step_to_all_loggers(tmp_path):
    loggers = [CSVLogger(tmp_path, name="csv"), TensorBoardLogger(tmp_path, name="tb")]
    _, trainer, _ = trained([IFTHypergradient(every_n_batches=4)], logger=loggers, enable_progress_bar=False)
    rows = [row for row in read_csv(tmp_path / "csv" / "version_0" / "metrics.csv") if row.get("hypergrad/norm")]
    assert [int(row["step"]) for row in rows] == [3, 7, 11]
    names = ["norm", "direct_norm", "indirect_norm", "outer_loss", "residual", "products", "skipped"]
    names = [f"hypergrad/{name}" for name in names] + [f"hyperparameter/decay/{k}" for k in ("mean", "min", "max")]
    for name in names:
        assert math.isfinite(float(rows[-1][name])), name
        assert float(trainer.callback_metrics[name]) == pytest.approx(float(rows[-1][name]), rel=1e-5)
    assert float(rows[-1]["hypergrad/products"]) == 2
    assert "hypergrad/norm" in trainer.progress_bar_metrics

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tb" / "version_0"))
    events.Reload()
    assert [event.step for event in events.Scalars("hypergrad/norm")] == [3, 7, 11]


def test_checkpoints_can_monitor_the_outer_loss(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, monitor="hypergrad/outer_loss", every_n_train_steps=4, save_top_k=2)
    trained([IFTHypergradient(every_n_batches=4), checkpoint], enable_checkpointing=True)
    assert len(list(tmp_path.glob("*.ckpt"))) == 2
    assert float(checkpoint.best_model_score) > 0


def test_two_instances_keep_their_own_state(tmp_path):
    first, second = IFTHypergradient(2, curvature="hessian", on_failure="use"), IFTHypergradient(3)
    assert first.state_key != second.state_key
    _, trainer, _ = trained([first, second])
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    state = torch.load(tmp_path / "two.ckpt", weights_only=True)["callbacks"]
    assert state[first.state_key]["stepper"]["steps"] == 6
    assert state[second.state_key]["stepper"]["steps"] == 4


def test_existing_training_step_serves_as_inner_loss():
    class Existing(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)
            self.scale = nn.Parameter(torch.ones(3))

        def training_step(self, batch):
            x, y = batch
            self.log("existing", 1.0)
            return {"loss": F.cross_entropy(self.layer(x) * self.scale * self.temperature.exp(), y)}

        def validation_step(self, batch):
            self.log("existing_val", 2.0)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    class Bilevel(BilevelLightningModule, Existing):
        def __init__(self):
            super().__init__()
            self.register_hyperparameter("temperature", torch.zeros(()))

        def outer_loss(self, batch):
            return F.cross_entropy(self.layer(batch[0]), batch[1])

    module = Bilevel()
    trainer = quiet_trainer(callbacks=[IFTHypergradient(2, outer_dataloader=loader(seed=1), on_failure="use")])
    trainer.fit(module, loader(), loader(seed=2))
    assert module.temperature != 0
    assert {"existing", "existing_val"} <= trainer.callback_metrics.keys()


def test_default_steps_log_both_losses():
    _, trainer, _ = trained([])
    assert {"inner_loss", "outer_loss"} <= trainer.callback_metrics.keys()


def test_warm_start_and_solver_are_passed_on():
    starts = []

    class Spy(Identity):
        def solve(self, operator, b, x0=None):
            starts.append(x0)
            return super().solve(operator, b, x0)

    for warm_start in (True, False):
        starts.clear()
        trained([IFTHypergradient(4, solver=Spy(), warm_start=warm_start)])
        assert [start is not None for start in starts] == [False, warm_start, warm_start]


def test_the_solver_is_bound_to_the_inner_optimizer():
    seen = []

    class Spy(Amortized):
        def _solve(self, operator, b, x0):
            seen.append(self.rule)
            return super()._solve(operator, b, x0)

    trained([IFTHypergradient(6, solver=Spy())], lambda: Classifier(lr=0.05))
    assert [rule.step for rule in seen] == [0.05] * 2


class IndefiniteRidge(Ridge):
    def inner_loss(self, batch):
        return super().inner_loss(batch) - self.w[:2].square().sum() * 5


@pytest.mark.parametrize(("policy", "moves"), [("skip", False), ("use", True)])
def test_failures_are_skipped_or_used_counted_and_told_once(policy, moves):
    module = IndefiniteRidge(lr=1e-3)
    callback = IFTHypergradient(1, curvature="hessian", solver=Neumann(terms=3), on_failure=policy)
    trainer = quiet_trainer(max_epochs=5, callbacks=[callback])
    with pytest.warns(UserWarning, match="negative curvature") as caught:
        trainer.fit(module)
    assert len([w for w in caught if "hyper step" in str(w.message)]) == 1
    assert bool(module.log_decay != -1) is moves
    assert callback.skipped == (0 if moves else 5)
    assert trainer.callback_metrics["hypergrad/skipped"] == callback.skipped


def test_failures_can_raise_with_the_diagnosis():
    callback = IFTHypergradient(1, curvature="hessian", solver=Neumann(terms=3), on_failure="raise")
    with pytest.raises(RuntimeError, match=r"negative_curvature.*λ_min"):
        quiet_trainer(callbacks=[callback]).fit(IndefiniteRidge(lr=1e-3))


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_nan_batch_skips_the_hyper_step_and_nothing_else():
    class Batches(Ridge):
        def train_dataloader(self):
            x = torch.cat([self.x, self.x, self.x * torch.nan, self.x])
            return DataLoader(TensorDataset(x, self.y.repeat(4)), batch_size=20)

        def training_step(self, batch, batch_idx):
            return None if batch[0].isnan().any() else super().training_step(batch, batch_idx)

    values = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            values.append(pl_module.log_decay.item())

    class Eager(IFTHypergradient):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
            self._cadence.optimizer_stepped()  # a batch without an optimizer step would make no hyper step at all

    module, callback = Batches(), Eager(1)
    trainer = quiet_trainer(callbacks=[callback, Watch()])
    with pytest.warns(UserWarning, match=r"status 'nonfinite'.*NaN or infinity.*skipped"):
        trainer.fit(module)
    assert values[1] == values[2] != values[3]
    assert all(map(math.isfinite, values))
    assert callback.skipped == 1


def test_random_state_of_outer_transforms_is_kept_apart():
    """Outer data that draw random numbers while they are fetched do not change what training draws."""

    class Noisy(Dataset):
        def __len__(self):
            return 8

        def __getitem__(self, index):
            return torch.rand(4), torch.tensor(0)

    def states(callbacks):
        return [batch[3] for batch in trained(callbacks, lambda: Classifier(hyper_lr=0.0))[2].batches]

    outer = DataLoader(Noisy(), batch_size=4, shuffle=True)
    assert same(states([IFTHypergradient(1, outer_dataloader=outer)]), states([]))


@pytest.mark.parametrize(("precision", "exact"), [("32", True), ("inherit", False)])
def test_curvature_precision(precision, exact, monkeypatch):
    """In mixed precision losses are evaluated in float32 unless told otherwise."""
    dtypes = []

    class Spy(Classifier):
        def outer_loss(self, batch):
            logits = self.net(batch[0])
            if torch.is_grad_enabled() and not self.net.training:
                dtypes.append(logits.dtype)
            return F.cross_entropy(logits, batch[1])

    trained([IFTHypergradient(4, precision=precision)], Spy, precision="bf16-mixed", limit_val_batches=0)
    assert set(dtypes) == {torch.float32 if exact else torch.bfloat16}


def test_double_precision_reaches_tensors_made_in_the_loss():
    class Made(Classifier):
        def outer_loss(self, batch):
            made = torch.zeros(3)
            assert made.dtype == torch.float64
            return F.cross_entropy(self.net(batch[0]) + made, batch[1])

    module, _, _ = trained([IFTHypergradient(4)], Made, precision="64-true")
    assert next(module.hyperparameters()).dtype == torch.float64


class Attention(Classifier):
    """Fused attention has no second derivative."""

    def __init__(self):
        super().__init__()
        self.net = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, dropout=0.0)
        self.decay = WeightDecay(self.net, initial=0.01)

    def inner_loss(self, batch):
        z = self.mark_outputs(self.net(batch[0].view(2, -1, 4)).flatten(0, 1)[:, :3])
        return F.cross_entropy(z, batch[1]) + self.decay()

    def outer_loss(self, batch):
        return F.cross_entropy(self.net(batch[0].view(2, -1, 4)).flatten(0, 1)[:, :3], batch[1])


@pytest.mark.filterwarnings("ignore:hyper step .* ended with status 'negative_curvature'")
@pytest.mark.parametrize("curvature", ["hessian", "gauss_newton", "finite_difference"])
def test_fused_attention_is_replaced_for_the_measurement(curvature):
    _, trainer, _ = trained([IFTHypergradient(4, curvature=curvature)], Attention)
    assert float(trainer.callback_metrics["hypergrad/indirect_norm"]) > 0


def test_compiled_modules_are_run_eagerly_for_the_measurement():
    def make():
        module = Classifier()
        module.net.compile(backend="aot_eager")
        return module

    _, trainer, _ = trained([IFTHypergradient(4)], make)
    assert float(trainer.callback_metrics["hypergrad/indirect_norm"]) > 0


def test_activation_checkpointing_gives_the_same_hypergradient():
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(Classifier):
        def outer_loss(self, batch):
            return F.cross_entropy(checkpoint(self.net, batch[0], use_reentrant=False), batch[1])

    def hyperparameters(module_type):
        module, _, _ = trained([IFTHypergradient(2)], module_type)
        return [p.clone() for p in module.hyperparameters()]

    assert same(hyperparameters(Checkpointed), hyperparameters(Classifier))


def test_a_module_can_be_copied_and_pickled():
    module = Classifier()
    for clone in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert [n for n, _ in clone.named_hyperparameters()] == [n for n, _ in module.named_hyperparameters()]
        with torch.no_grad():
            clone.net[0].weight.add_(1.0)
        assert clone.decay() > module.decay()


def test_weights_may_be_unfrozen_while_training():
    class Unfreeze(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            pl_module.net[0].requires_grad_(trainer.global_step >= 6)

    sizes = []

    class Spy(Amortized):
        def _solve(self, operator, b, x0):
            sizes.append((operator.size, x0 is not None))
            return super()._solve(operator, b, x0)

    trained([Unfreeze(), IFTHypergradient(3, solver=Spy())])
    assert sizes == [(43, False), (43, True), (83, False), (83, True)]


def test_the_second_fit_begins_anew():
    callback = IFTHypergradient(4)
    for _ in range(2):
        trained([callback])
        assert callback._stepper.steps == 3


def test_validate_and_test_do_not_start_anything():
    callback = IFTHypergradient(4)
    trainer = quiet_trainer(callbacks=[callback])
    trainer.validate(Classifier(), verbose=False)
    assert callback._stepper is None


def test_nothing_stays_behind_after_an_exception_in_the_users_loss():
    class Fails(Classifier):
        def outer_loss(self, batch):
            if self.global_step >= 4:
                raise RuntimeError("user error")
            return super().outer_loss(batch)

    module = Fails()
    with pytest.raises(RuntimeError, match="user error"):
        trained([IFTHypergradient(4)], lambda: module, limit_val_batches=0)
    assert all(m.training for m in module.net.modules())
    assert not any(p.requires_grad for p in module.hyperparameters())
    assert "log" not in vars(module)


def test_the_stepper_uses_a_new_outer_batch_each_time(monkeypatch):
    batches = []
    prepared = HyperStepper._prepared

    def spy(self, batch):
        batches.append(batch[0].sum().item())
        return prepared(self, batch)

    monkeypatch.setattr(HyperStepper, "_prepared", spy)
    trained([IFTHypergradient(1)])
    assert batches[0] == batches[1]  # the rehearsal uses nothing up
    assert len(set(batches[1:])) > 6


def test_weight_decay_of_the_optimizer_is_part_of_the_curvature():
    """Half of the decay in the loss, half in the optimizer: the same minimum, and the same hypergradient."""

    class Halved(Ridge):
        def inner_loss(self, batch):
            return super().inner_loss(batch) - 0.25 * self.w @ self.w

        def configure_optimizers(self):
            return torch.optim.SGD(self.inner_parameters(), lr=self.lr, weight_decay=0.5)

    moved = []
    for make in (Ridge, Halved):
        module = make()
        solver = ConjugateGradient(max_iterations=50, rtol=1e-12)
        quiet_trainer(max_epochs=500, callbacks=[IFTHypergradient(1, solver=solver, start_after_batches=499)]).fit(
            module
        )
        moved.append(-1 - module.log_decay)
    assert relative_error(*moved) < 1e-8


class Rude(Classifier):
    """Does in its losses what existing modules do: logs to the logger, changes its batch, differentiates by itself."""

    def inner_loss(self, batch):
        x, y = batch
        self.logger.log_metrics({"from inside": 1.0})
        self.logger.experiment.add_scalar("from inside", 1.0)
        x.mul_(0.5)
        x.requires_grad_()
        loss = super().inner_loss((x, y))
        (slope,) = torch.autograd.grad(self.net[0](x).tanh().sum(), x, create_graph=True)
        return loss + 0.01 * slope.square().sum()


@pytest.mark.filterwarnings("ignore:hyper step .* ended with status 'negative_curvature'")
def test_losses_may_log_change_their_batch_and_differentiate(tmp_path):
    results = []
    for callbacks in ([IFTHypergradient(1, on_failure="use", curvature="hessian")], []):
        logger = TensorBoardLogger(tmp_path / str(len(callbacks)))
        results.append(trained(callbacks, lambda: Rude(hyper_lr=0.0), logger=logger)[2].batches)
    assert same(*results)


def test_modules_made_in_the_first_forward_pass_are_made_by_training():
    class Lazy(Classifier):
        def inner_loss(self, batch):
            if not hasattr(self, "late"):
                self.late = nn.Linear(4, 3)
            return super().inner_loss(batch) + self.late(batch[0]).square().mean()

    def run(callbacks):
        return [batch[0] for batch in trained(callbacks, lambda: Lazy(hyper_lr=0.0))[2].batches]

    assert same(run([IFTHypergradient(1, on_failure="use")]), run([]))


def test_several_validation_loaders_and_any_step_signature():
    class Several(Classifier):
        def training_step(self, *arguments):
            return self.inner_loss(arguments[0])

        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            self.log(f"val_{dataloader_idx}", self.outer_loss(batch), add_dataloader_idx=False)

        def val_dataloader(self):
            return [loader(8), loader(8)]

    _, trainer, _ = trained([IFTHypergradient(4)], Several)
    assert {"val_0", "val_1"} <= trainer.callback_metrics.keys()


def test_a_loaded_state_belongs_to_its_own_fit(tmp_path):
    callback = IFTHypergradient(4)
    _, trainer, _ = trained([callback])
    trainer.save_checkpoint(tmp_path / "old.ckpt")
    trainer = quiet_trainer(callbacks=[callback], max_epochs=1)
    trainer.validate(Classifier(), ckpt_path=tmp_path / "old.ckpt", verbose=False)
    trainer.fit(Classifier())
    assert callback._stepper.steps == 1


def test_worker_processes_of_the_outer_data_end_with_the_fit():
    import multiprocessing

    outer = DataLoader(TensorDataset(torch.randn(8, 4), torch.zeros(8, dtype=torch.long)), batch_size=4, num_workers=1)
    trained([IFTHypergradient(4, outer_dataloader=outer)])
    assert not multiprocessing.active_children()


def test_a_learning_rate_of_zero_is_survived():
    _, trainer, _ = trained([IFTHypergradient(4)], lambda: Classifier(lr=0.0))
    assert float(trainer.callback_metrics["hypergrad/skipped"]) == 0


def test_it_serves_pytorch_lightning_too():
    pl = pytest.importorskip("pytorch_lightning")
    dtypes = []

    class Module(BilevelLightningModule, pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(4, 3)
            self.register_hyperparameter("decay", WeightDecay(self.net, initial=0.01))

        def inner_loss(self, batch):
            return F.cross_entropy(self.mark_outputs(self.net(batch[0])), batch[1]) + self.decay()

        def outer_loss(self, batch):
            logits = self.net(batch[0])
            if torch.is_grad_enabled():
                dtypes.append(logits.dtype)
            return F.cross_entropy(logits, batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module = Module()
    trainer = pl.Trainer(
        max_epochs=3,
        accelerator="cpu",
        precision="bf16-mixed",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[IFTHypergradient(2, outer_dataloader=loader(seed=1))],
    )
    trainer.fit(module, loader(), loader(seed=2))
    assert module.decay.decays()[0].item() != pytest.approx(0.01, rel=1e-3)
    assert set(dtypes) == {torch.float32}


class Tiny(BilevelLightningModule, L.LightningModule):
    """Gradients too small for float16; a temperature is tuned."""

    def __init__(self, size=1e-6):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        self.register_hyperparameter("temperature", torch.tensor(0.3))
        self.size = size

    def inner_loss(self, batch):
        logits = self.mark_outputs(self.net(batch[0])) * self.temperature.exp()
        return self.size * F.cross_entropy(logits, batch[1])

    def outer_loss(self, batch):
        return self.size * F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.inner_parameters(), lr=0.1 / self.size)

    def configure_hyper_optimizer(self):
        return torch.optim.SGD(self.hyperparameters(), lr=0.0)

    def train_dataloader(self):
        return loader()

    def val_dataloader(self):
        return loader(20, batch_size=20, seed=1)

    outer_dataloader = val_dataloader


def in_float16(callback, size=1e-6):
    """Trains for one step, and returns the hypergradient and the scale of the Trainer's own scaler."""
    torch.manual_seed(0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    trainer = quiet_trainer(
        callbacks=[callback],
        plugins=[MixedPrecision("16-mixed", "cpu", scaler)],
        limit_val_batches=0,
        max_steps=1,
    )
    trainer.fit(Tiny(size))
    return float(trainer.callback_metrics["hypergrad/norm"]), scaler.get_scale()


@pytest.mark.parametrize("curvature", ["hessian", "gauss_newton"])
def test_small_gradients_survive_float16_by_a_loss_scale_of_our_own(curvature, monkeypatch):
    solver = ConjugateGradient(5, damping="horizon", horizon=2)
    exact, _ = in_float16(IFTHypergradient(1, curvature=curvature, solver=solver))
    scaled, trainers = in_float16(IFTHypergradient(1, curvature=curvature, solver=solver, precision="inherit"))
    assert scaled == pytest.approx(exact, rel=0.02)
    assert trainers == 2.0**12  # whose scaler is not touched
    monkeypatch.setattr("lightning_ifthpo.callbacks.hyper_step.LARGEST", 1.0)
    unscaled, _ = in_float16(IFTHypergradient(1, curvature=curvature, solver=solver, precision="inherit"))
    assert unscaled != pytest.approx(exact, rel=0.1)


def test_a_loss_scale_that_overflows_is_lowered_and_kept():
    callback = IFTHypergradient(1, precision="inherit")
    exact, _ = in_float16(IFTHypergradient(1), size=10.0)
    scaled, _ = in_float16(callback, size=10.0)
    assert scaled == pytest.approx(exact, rel=0.02)
    assert callback.skipped == 0
    assert callback.state_dict()["stepper"]["loss_scale"] < 2.0**16


@pytest.mark.parametrize(("curvature", "message"), [("gradient_outer_product", "float16"), ("kfac", "needs float32")])
def test_what_cannot_be_scaled_is_refused(curvature, message):
    with pytest.raises(ValueError, match=message):
        in_float16(IFTHypergradient(1, curvature=curvature, solver=Direct(damping=1.0), precision="inherit"))
