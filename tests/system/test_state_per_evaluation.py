"""Every evaluation of a loss sees the same state, whatever the loss moves."""

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_ifthpo import (
    BilevelLightningModule,
    ExactGeN,
    IFTHypergradient,
    SharpnessMonitor,
    implicit_hypergradient,
)
from lightning_ifthpo.core.loss import Loss
from lightning_ifthpo.curvature import AverageOperator, FiniteDifferenceOperator, HessianOperator
from lightning_ifthpo.solvers import Direct
from lightning_ifthpo.step_size import exact_parabola, three_point_parabola
from tests.helpers.brought import MOVING
from tests.helpers.device import WHERE, randn, within
from tests.helpers.problems import relative_error
from tests.helpers.trainers import Recorder, quiet_trainer, same

WIDTH = 4


def problem(name):
    torch.manual_seed(0)
    net = MOVING[name](WIDTH).to(**WHERE)
    x = randn(12, WIDTH, seed=1)
    return (lambda: net(x)), [p for p in net.parameters() if p.requires_grad], net


@pytest.mark.parametrize("name", MOVING)
def test_all_evaluations_of_a_loss_are_the_same_function(name):
    function, weights, net = problem(name)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    loss = Loss(function, weights)
    first = loss.value()
    assert all(torch.equal(loss.value(), first) for _ in range(3))
    assert same(net.state_dict(), before)
    fresh, _, _ = problem(name)
    assert torch.equal(first, fresh().detach())


@pytest.mark.parametrize("name", MOVING)
def test_finite_differences_equal_the_exact_product(name):
    function, weights, _ = problem(name)
    exact = HessianOperator(function, weights)
    v = randn(exact.size, seed=2)
    product = exact.matvec(v)
    assert relative_error(FiniteDifferenceOperator(function, weights).matvec(v), product) < within(1e-7, power=0.5)


@pytest.mark.parametrize("name", MOVING)
def test_a_product_of_an_average_is_the_same_twice(name):
    function, weights, _ = problem(name)
    average = AverageOperator([lambda: HessianOperator(function, weights)] * 2, [1, 1])
    v = randn(average.size, seed=2)
    product = average.matvec(v)
    assert torch.equal(average.matvec(v), product)
    assert relative_error(product, HessianOperator(function, weights).matvec(v)) < within(1e-12)


@pytest.mark.parametrize("name", MOVING)
def test_three_losses_lie_on_the_exact_parabola(name):
    function, weights, _ = problem(name)
    space = Loss(function, weights).space
    direction = space.split(HessianOperator(function, weights).gradient)
    exact = exact_parabola(function, weights, direction)
    points = three_point_parabola(function, weights, direction, step=1e-3)
    assert points.slope == pytest.approx(exact.slope, rel=1e-3)
    assert points.curvature == pytest.approx(exact.curvature, rel=0.02 if WHERE["dtype"] == torch.float64 else 0.3)


@pytest.mark.parametrize("name", MOVING)
def test_hypergradients_by_differences_equal_exact_ones(name):
    function, weights, _ = problem(name)
    decay = torch.tensor(0.1, **WHERE)

    def inner():
        return function() + decay * sum(w.square().sum() for w in weights)

    def gradient(curvature):
        outer = lambda: sum((w - 1).square().sum() for w in weights)  # noqa: E731
        result = implicit_hypergradient(inner, outer, weights, [decay], curvature=curvature, solver=Direct(damping=1.0))
        return result.gradients[0]

    assert relative_error(gradient("finite_difference"), gradient("hessian")) < within(1e-6, power=0.5)


def module_of(name):
    class Module(BilevelLightningModule, L.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net = MOVING[name](WIDTH)
            self.register_hyperparameter("decay", torch.tensor(0.01))

        def training_step(self, batch, batch_idx):
            penalty = sum(p.square().sum() for p in self.net.parameters() if p.requires_grad)
            return self.net(batch) + self.decay * penalty

        def outer_loss(self, batch):
            return sum((p - 0.1).square().sum() for p in self.net.parameters() if p.requires_grad)

        def outer_dataloader(self):
            return DataLoader(torch.zeros(1, 1))

        val_dataloader = outer_dataloader

        def configure_optimizers(self):
            return torch.optim.SGD([p for p in self.net.parameters() if p.requires_grad], lr=0.02)

        def configure_hyper_optimizer(self):
            return torch.optim.SGD(self.hyperparameters(), lr=0.0)

        def train_dataloader(self):
            return DataLoader(randn(48, WIDTH, seed=3).to("cpu", torch.float32), batch_size=12)

    return Module()


def run(name, *callbacks):
    module, recorder = module_of(name), Recorder()
    trainer = quiet_trainer(callbacks=[*callbacks, recorder], max_epochs=2, limit_val_batches=0)
    trainer.fit(module)
    return {key: float(value) for key, value in trainer.callback_metrics.items()}, recorder


def monitor(curvature):
    return SharpnessMonitor(2, curvature=curvature, max_overhead=None, rtol=1e-4, max_iterations=60)


def hyper(curvature):
    return IFTHypergradient(2, curvature=curvature, solver=Direct(damping=1.0))


OBSERVERS = {"monitor": monitor, "hypergradient": hyper}
VALUE = {"monitor": "sharpness/lambda_max", "hypergradient": "hypergrad/indirect_norm"}


@pytest.mark.parametrize("name", MOVING)
@pytest.mark.parametrize("observer", OBSERVERS)
def test_observers_agree_by_differences_and_leave_no_trace(observer, name):
    exact, watched = run(name, OBSERVERS[observer]("hessian"))
    differences, _ = run(name, OBSERVERS[observer]("finite_difference"))
    _, plain = run(name)
    assert differences[VALUE[observer]] == pytest.approx(exact[VALUE[observer]], rel=0.02)
    assert same(watched.batches, plain.batches)
    assert exact.get("sharpness/failures", 0.0) == exact.get("hypergrad/skipped", 0.0) == 0.0


@pytest.mark.parametrize("name", MOVING)
def test_three_points_see_the_same_slope_and_curvature_as_the_hessian(name):
    points, _ = run(name, ExactGeN(1, curvature="three_point"))
    exact, _ = run(name, ExactGeN(1, curvature="hessian"))
    assert points["gen/directional_sharpness"] == pytest.approx(exact["gen/directional_sharpness"], rel=0.3)
    assert points["gen/lr"] == pytest.approx(exact["gen/lr"], rel=0.3)
