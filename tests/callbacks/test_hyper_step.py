"""What a hyper step takes and remembers."""

import torch
from lightning.pytorch.callbacks import Callback

from lightning_ifthpo import IFTHypergradient
from lightning_ifthpo.solvers import Amortized, ConjugateGradient, Identity
from tests.helpers.problems import relative_error
from tests.helpers.trainers import Classifier, Ridge, quiet_trainer, trained


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
    assert len(batches) == 2 + 12  # the rehearsal evaluates it twice, each of twelve hyper steps once
    assert batches[0] == batches[1] == batches[2]  # the rehearsal uses nothing up
    assert len(set(batches[2:])) > 6


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
