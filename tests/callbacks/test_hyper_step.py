"""What a hyper step takes and remembers."""

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from lightning_ifthpo import IFTHypergradient
from lightning_ifthpo.solvers import Amortized, ConjugateGradient, Direct, Identity, MinimumResidual, Neumann, Nystrom
from tests.helpers.problems import relative_error
from tests.helpers.trainers import Classifier, Ridge, quiet_trainer, trained


def test_warm_start_and_solver_are_passed_on():
    starts = []

    class Spy(ConjugateGradient):
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
        def _solve(self, system, b, x0):
            seen.append(self.rule)
            return super()._solve(system, b, x0)

    trained([IFTHypergradient(6, solver=Spy())], lambda: Classifier(lr=0.05))
    assert [rule.step_size for rule in seen] == [0.05] * 2


def test_weights_may_be_unfrozen_while_training():
    class Unfreeze(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            pl_module.net[0].requires_grad_(trainer.global_step >= 6)

    sizes = []

    class Spy(Amortized):
        def _solve(self, system, b, x0):
            sizes.append((system.operator.size, x0 is not None))
            return super()._solve(system, b, x0)

    trained([Unfreeze(), IFTHypergradient(3, solver=Spy())])
    assert sizes == [(43, False), (43, True), (83, False), (83, True)]


def test_the_stepper_uses_a_new_outer_batch_each_time():
    batches = []

    class Spy(Classifier):
        def outer_loss(self, batch):
            batches.append(batch[0].sum().item())
            return super().outer_loss(batch)

    trained([IFTHypergradient(1)], Spy, limit_val_batches=0)
    # the dry run and each of twelve hyper steps evaluate it once, and the summary the first four again
    assert len(batches) == 1 + 12 + 4
    assert batches[0] == batches[1]  # the dry run uses nothing up
    assert batches[13:] == batches[1:5]
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


def test_a_learning_rate_of_zero_is_survived():
    _, trainer, _ = trained([IFTHypergradient(4)], lambda: Classifier(lr=0.0))
    assert float(trainer.callback_metrics["hypergrad/skipped"]) == 0


class Probe(Ridge):
    """Ridge regression on features of a layer that training does not move, or moves later."""

    def __init__(self, kind="left out"):
        super().__init__(lr=0.5)
        self.kind = kind
        torch.manual_seed(0)
        self.first = torch.nn.Linear(4, 4, dtype=torch.float64)
        self.features = torch.nn.Linear(4, 4, dtype=torch.float64)

    def phi(self, x):
        return torch.tanh(self.features(torch.tanh(self.first(x))))

    def inner_loss(self, batch):
        return super().inner_loss((self.phi(batch[0]), batch[1]))

    def outer_loss(self, batch):
        return super().outer_loss((self.phi(batch[0]), batch[1]))

    def closed_form(self, log_decay):
        fixed = Ridge()
        fixed.x, fixed.xv, fixed.y, fixed.yv = self.phi(self.x), self.phi(self.xv), self.y, self.yv
        return fixed.closed_form(log_decay).detach()

    def configure_optimizers(self):
        backbone = [*self.first.parameters(), *self.features.parameters()]
        if self.kind == "left out":
            return torch.optim.SGD([self.w], lr=self.lr)
        if self.kind == "frozen":
            self.first.requires_grad_(False)
            self.features.requires_grad_(False)
            return torch.optim.SGD(self.inner_parameters(), lr=self.lr)
        if self.kind == "two optimizers":
            return torch.optim.SGD([self.w], lr=self.lr), torch.optim.Adam(backbone, lr=0.0)
        rate = torch.tensor(0.0) if self.kind == "tensor of rate zero" else 0.0
        return torch.optim.SGD([{"params": [self.w]}, {"params": backbone, "lr": rate}], lr=self.lr, foreach=False)


class ManualProbe(Probe):
    def __init__(self, kind):
        super().__init__(kind)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizers = self.optimizers()
        for optimizer in optimizers if isinstance(optimizers, list) else [optimizers]:
            optimizer.zero_grad()
        loss = self.inner_loss(batch)
        self.manual_backward(loss)
        for optimizer in optimizers if isinstance(optimizers, list) else [optimizers]:
            optimizer.step()


def probed(module, solver, **options):
    """Returns the step of the hyperparameter at the minimum, where 399 steps of training lead."""
    options = {"curvature": "hessian", "on_failure": "use", "start_after_batches": 399} | options
    quiet_trainer(max_epochs=400, callbacks=[IFTHypergradient(1, solver=solver, **options)], limit_val_batches=0).fit(
        module
    )
    start = torch.tensor(-1.0, dtype=torch.float64)
    return (start - module.log_decay).reshape(1), module.closed_form(start).reshape(1)


SOLVERS = {
    "cg": (ConjugateGradient(max_iterations=50, rtol=1e-12), 1e-10),
    "minres": (MinimumResidual(max_iterations=50, rtol=1e-12), 1e-10),
    "direct": (Direct(), 1e-10),
    "neumann": (Neumann(terms=3000), 1e-10),
    "nystrom": (Nystrom(rank=4, damping=1e-9), 1e-5),  # its damping over the smallest curvature, 5e-9 … 1e-6
    "amortized": (Amortized(products=50, horizon=100_000), 1e-3),  # its damping, 2e-5 of the smallest curvature 0.4
}


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("kind", ["left out", "rate zero", "frozen"])
def test_the_system_is_that_of_the_weights_that_move(kind, name):
    solver, tolerance = SOLVERS[name]
    assert relative_error(*probed(Probe(kind), solver)) < tolerance


@pytest.mark.parametrize("kind", ["left out", "rate zero", "two optimizers", "tensor of rate zero"])
def test_manual_optimization_too(kind):
    assert relative_error(*probed(ManualProbe(kind), SOLVERS["cg"][0])) < 1e-10


def test_a_warm_start_belongs_to_the_weights_that_moved():
    """The two layers that take turns have as many weights, so that the length of a start does not tell them apart."""

    class Alternating(Probe):
        def __init__(self):
            super().__init__()
            torch.nn.init.ones_(self.w)

        def configure_optimizers(self):
            groups = [{"params": module.parameters()} for module in (self.first, self.features)]
            return torch.optim.SGD(groups, lr=0.1)

        def on_train_batch_start(self, batch, batch_idx):
            groups = self.trainer.optimizers[0].param_groups
            groups[0]["lr"], groups[1]["lr"] = (0.1, 0.0) if self.trainer.global_step % 4 < 2 else (0.0, 0.1)

        def inner_loss(self, batch):
            return super().inner_loss(batch) + self.log_decay.exp() * (
                self.first.weight.square().sum() + self.features.weight.square().sum()
            )

    starts = []

    class Spy(Amortized):
        def _solve(self, system, b, x0):
            starts.append((len(b), x0 is not None))
            return super()._solve(system, b, x0)

    callback = IFTHypergradient(1, solver=Spy(), curvature="gauss_newton", on_failure="use")
    quiet_trainer(max_epochs=8, callbacks=[callback], limit_val_batches=0).fit(Alternating())
    assert starts == [(20, False), (20, True)] * 4


def test_a_warm_start_survives_a_checkpoint(tmp_path):
    """With a group at rate zero, which the dry run includes."""
    starts = []

    class Spy(Amortized):
        def _solve(self, system, b, x0):
            starts.append(x0)
            return super()._solve(system, b, x0)

    def fit(epochs, **options):
        trainer = quiet_trainer(
            max_epochs=epochs, callbacks=[IFTHypergradient(1, solver=Spy(), on_failure="use")], limit_val_batches=0
        )
        trainer.fit(module := Probe("rate zero"), **options)
        return trainer, module.log_decay.item()

    _, whole = fit(4)
    fit(2)[0].save_checkpoint(tmp_path / "two.ckpt")
    _, resumed = fit(4, ckpt_path=tmp_path / "two.ckpt")
    assert resumed == whole
    assert starts[0] is None
    assert all(start is not None and len(start) == 4 for start in (*starts[1:4], *starts[-2:]))


def test_all_weights_move_at_the_start_of_a_warm_up():
    sizes = []

    class Spy(Identity):
        def solve(self, operator, b, x0=None):
            sizes.append(len(b))
            return super().solve(operator, b, x0)

    class WarmUp(Classifier):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(step >= 6))
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    trained([IFTHypergradient(4, solver=Spy())], WarmUp)
    assert sizes == [83, 83, 83]


def test_a_hyperparameter_of_weights_that_move_later_is_no_error():
    class Later(Probe):
        def inner_loss(self, batch):
            x, y = batch
            penalty = self.log_decay.exp() * self.first.weight.square().sum() / 2
            return (self.mark_outputs(self.phi(x) @ self.w) - y).square().mean() / 2 + penalty

        def on_train_epoch_start(self):
            self.trainer.optimizers[0].param_groups[1]["lr"] = 0.1 * (self.current_epoch >= 2)

    values = []

    class Watch(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            values.append(pl_module.log_decay.item())

    callback = IFTHypergradient(1, solver=Identity(), curvature="gauss_newton")
    quiet_trainer(max_epochs=4, callbacks=[callback, Watch()], limit_val_batches=0).fit(Later("rate zero"))
    assert values[0] == values[1] == -1.0  # no weight moves that it influences
    assert values[1] != values[2] != values[3]
