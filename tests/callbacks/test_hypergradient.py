"""IFTHypergradient in a real Trainer."""

import csv
import math

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ifthpo import BilevelLightningModule, IFTHypergradient
from lightning_ifthpo.hyperparameters import WeightDecay
from lightning_ifthpo.solvers import Amortized, ConjugateGradient, Direct, Identity, Neumann
from tests.helpers.problems import relative_error
from tests.helpers.trainers import ACCELERATOR, Classifier, Ridge, loader, quiet_trainer, same, trained


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
    assert disabled.state_dict()["stepper"]["steps"] == (12 if not options else 6)


def test_only_hyperparameters_change_and_they_do():
    module, _, _ = trained([IFTHypergradient(every_n_batches=2)])
    decays = torch.stack(list(module.decay.natural_values().values()))
    assert not torch.allclose(decays, torch.full_like(decays, 0.01), rtol=1e-2)
    assert all(p.grad is None and not p.requires_grad for p in module.hyperparameters())


@pytest.mark.parametrize("curvature", ["auto", "hessian", "gauss_newton", "finite_difference"])
def test_ridge_takes_a_step_along_its_closed_form(curvature):
    """300 full-batch steps to the minimum, then one hyper step of gradient descent with learning rate one."""
    module = Ridge()
    # differences of gradients leave eps^⅔ = 4e-11 of a product, and so do not reach a smaller residual
    solver = ConjugateGradient(max_iterations=50, rtol=1e-9 if curvature == "finite_difference" else 1e-12)
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
    first, second, *_ = module.hyperparameter_values()["decay"].values()
    assert all(decay != pytest.approx(0.01, rel=1e-3) for decay in (first, second))


@pytest.mark.slow
@pytest.mark.parametrize(("horizon", "tolerance"), [(10_000, 0.03), (100, 0.2)])
def test_the_amortized_solver_finds_the_best_decay_of_ridge(horizon, tolerance):
    """A finite horizon sees less of the slow directions, and so ends near the optimum rather than on it."""
    module = Ridge()
    module.configure_hyper_optimizer = lambda: torch.optim.Adam(module.hyperparameters(), lr=0.01)
    quiet_trainer(max_epochs=3000, callbacks=[IFTHypergradient(5, solver=Amortized(horizon=horizon))]).fit(module)
    grid = torch.linspace(-4, 2, 601, dtype=torch.float64)
    slopes = torch.stack([module.closed_form(point) for point in grid])
    assert abs(module.log_decay - grid[(slopes > 0).nonzero()[0, 0]]) < tolerance


def read_csv(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_metrics_are_logged_once_at_their_step_to_all_loggers(tmp_path):
    loggers = [CSVLogger(tmp_path, name="csv"), TensorBoardLogger(tmp_path, name="tb")]
    callback = IFTHypergradient(every_n_batches=4)
    _, trainer, _ = trained([callback], logger=loggers, enable_progress_bar=False)
    rows = [row for row in read_csv(tmp_path / "csv" / "version_0" / "metrics.csv") if row.get("hypergrad/norm")]
    assert [int(row["step"]) for row in rows] == [3, 7, 11]
    names = ["norm", "direct_norm", "indirect_norm", "outer_loss", "residual", "products", "skipped", "gain"]
    names = [f"hypergrad/{name}" for name in names] + [f"hyperparameter/decay/{k}" for k in ("mean", "min", "max")]
    for name in names:
        assert math.isfinite(float(rows[-1][name])), name
        assert float(trainer.callback_metrics[name]) == pytest.approx(float(rows[-1][name]), rel=1e-5)
    assert float(rows[-1]["hypergrad/products"]) == 2
    assert {"hypergrad/outer", "hypergrad/gain"} <= trainer.progress_bar_metrics.keys()
    assert float(rows[-1]["hypergrad/gain"]) == pytest.approx(callback.summary().confirmed, rel=1e-5)

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
    # the identity does not fail, whatever the Hessian of the first batches is
    first, second = IFTHypergradient(2, curvature="hessian", solver=Identity()), IFTHypergradient(3)
    assert first.state_key != second.state_key
    _, trainer, _ = trained([first, second])
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    state = torch.load(tmp_path / "two.ckpt", weights_only=True)["callbacks"]
    assert state[first.state_key]["stepper"]["steps"] == 6
    assert state[second.state_key]["stepper"]["steps"] == 4


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
            # a batch without an optimizer step would make no hyper step at all
            self.on_before_optimizer_step(trainer, pl_module, trainer.optimizers[0])

    module, callback = Batches(), Eager(1)
    trainer = quiet_trainer(callbacks=[callback, Watch()])
    with pytest.warns(UserWarning, match=r"status 'nonfinite'.*NaN or infinity.*skipped"):
        trainer.fit(module)
    assert values[1] == values[2] != values[3]
    assert all(map(math.isfinite, values))
    assert callback.skipped == 1


def test_the_second_fit_begins_anew():
    callback = IFTHypergradient(4)
    for _ in range(2):
        trained([callback])
        assert callback.state_dict()["stepper"]["steps"] == 3


def test_validate_and_test_do_not_start_anything():
    callback = IFTHypergradient(4)
    trainer = quiet_trainer(callbacks=[callback])
    trainer.validate(Classifier(), verbose=False)
    assert callback.state_dict() == {}


def test_a_loaded_state_belongs_to_its_own_fit(tmp_path):
    callback = IFTHypergradient(4)
    _, trainer, _ = trained([callback])
    trainer.save_checkpoint(tmp_path / "old.ckpt")
    trainer = quiet_trainer(callbacks=[callback], max_epochs=1)
    trainer.validate(Classifier(), ckpt_path=tmp_path / "old.ckpt", verbose=False)
    trainer.fit(Classifier())
    assert callback.state_dict()["stepper"]["steps"] == 1


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
        **ACCELERATOR,
        precision="bf16-mixed",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[IFTHypergradient(2, outer_dataloader=loader(seed=1))],
    )
    trainer.fit(module, loader(), loader(seed=2))
    assert module.decay.natural_values().item() != pytest.approx(0.01, rel=1e-3)
    assert set(dtypes) == {torch.float32}


@pytest.mark.filterwarnings("ignore:outer_loss depends on hyperparameter 'decay' by itself")
def test_an_outer_loss_that_does_not_depend_on_the_weights_is_reported_once():
    class Alone(Classifier):
        def outer_loss(self, batch):
            return sum(decay.square().sum() for decay in self.hyperparameters())

    with pytest.warns(
        UserWarning, match="hyper step 1: zero right-hand side: the outer loss does not depend"
    ) as caught:
        _, trainer, _ = trained([IFTHypergradient(1)], Alone)
    assert len([warning for warning in caught if "zero right-hand side" in str(warning.message)]) == 1
    assert float(trainer.callback_metrics["hypergrad/skipped"]) == 0
    assert float(trainer.callback_metrics["hypergrad/direct_norm"]) > 0


@pytest.mark.parametrize("options", [{"max_epochs": 0}, {"max_epochs": 1, "limit_train_batches": 0}], ids=str)
def test_a_fit_that_trains_nothing_ends_well(options):
    quiet_trainer(callbacks=[IFTHypergradient(1)], **options).fit(Classifier())


def test_a_finished_run_can_be_resumed(tmp_path):
    trainer = quiet_trainer(max_epochs=1, callbacks=[IFTHypergradient(1)])
    trainer.fit(Classifier())
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    quiet_trainer(max_epochs=1, callbacks=[IFTHypergradient(1)]).fit(Classifier(), ckpt_path=tmp_path / "end.ckpt")
