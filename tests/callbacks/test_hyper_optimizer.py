"""The hyper-optimizer: what is refused, and master copies in float32."""

import copy
import math

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ifthpo import BilevelLightningModule, IFTHypergradient
from lightning_ifthpo.callbacks.hyper_optimizer import HyperOptimizer
from lightning_ifthpo.hyperparameters import WeightDecay
from lightning_ifthpo.optimizers import PolyakRMSprop
from lightning_ifthpo.solvers import Identity
from tests.checks import check_state_is_plain
from tests.helpers.trainers import Classifier, Ridge, quiet_trainer


class AskingForAClosure(torch.optim.SGD):
    """Asks at its step, as sharpness-aware optimizers do."""

    def step(self, closure=None):
        assert closure is not None, "a closure is required"
        return super().step(closure)


def adam(module):
    return torch.optim.Adam(module.hyperparameters())


def scheduled(module, scheduler=torch.optim.lr_scheduler.ExponentialLR, **options):
    optimizer = torch.optim.SGD(module.hyperparameters(), lr=1.0)
    return {"optimizer": optimizer, "lr_scheduler": scheduler(optimizer, **options)}


REFUSED = {
    "list": (lambda m: [adam(m)], TypeError, r"to return None, one torch optimizer, .*got \[Adam"),
    "two optimizers": (lambda m: ([adam(m), adam(m)], []), TypeError, r"got \(\[Adam"),
    "optimizer and number": (lambda m: (adam(m), 0.1), TypeError, r"got \(Adam"),
    "dict without": (lambda m: {"lr_scheduler": None}, TypeError, "got {'lr_scheduler'"),
    "no scheduler": (lambda m: {"optimizer": adam(m), "lr_scheduler": 0.1}, TypeError, "with one scheduler"),
    "each epoch": (
        lambda m: {
            "optimizer": (one := scheduled(m, gamma=0.5))["optimizer"],
            "lr_scheduler": {"scheduler": one["lr_scheduler"], "interval": "epoch", "frequency": 1, "name": "hyper"},
        },
        TypeError,
        "{'interval': 'epoch'} asks for another time",
    ),
    "of another": (
        lambda m: {"optimizer": adam(m), "lr_scheduler": scheduled(m, gamma=0.5)["lr_scheduler"]},
        ValueError,
        "belongs to another optimizer",
    ),
    "plateau": (lambda m: scheduled(m, torch.optim.lr_scheduler.ReduceLROnPlateau), TypeError, "waits for a metric"),
    "class": (lambda m: torch.optim.Adam, TypeError, "got <class"),
    "LBFGS": (lambda m: torch.optim.LBFGS(m.hyperparameters()), ValueError, "LBFGS needs a closure"),
    "closure": (lambda m: AskingForAClosure(m.hyperparameters(), lr=0.1), ValueError, "AskingForAClosure needs a clo"),
    "all parameters": (lambda m: torch.optim.Adam(m.parameters()), ValueError, "the weight 'w' of Ridge"),
    "weights": (lambda m: torch.optim.Adam(m.inner_parameters()), ValueError, "the weight 'w' of Ridge"),
    "foreign": (lambda m: torch.optim.Adam([nn.Parameter(torch.zeros(2))]), ValueError, "a tensor that is no hyperpar"),
    "empty group": (lambda m: torch.optim.Adam([{"params": []}]), ValueError, "the hyper-optimizer is empty"),
    "empty": (lambda m: torch.optim.Adam([]), ValueError, "empty parameter list"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_another_kind_of_optimizer_is_refused_before_the_first_batch(kind):
    make, error, message = REFUSED[kind]
    module = Ridge()
    module.configure_hyper_optimizer = lambda: make(module)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    trainer = quiet_trainer(callbacks=[IFTHypergradient(1)])
    with pytest.raises(error, match=f"(?s){message}"):
        trainer.fit(module)
    assert trainer.global_step == 0
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize(
    "form",
    [
        lambda one: one,
        lambda one: {"optimizer": one["optimizer"], "lr_scheduler": {"scheduler": one["lr_scheduler"]}},
        lambda one: ([one["optimizer"]], [one["lr_scheduler"]]),
    ],
    ids=["dict", "dict of dicts", "lists"],
)
def test_a_scheduler_makes_a_step_after_each_hyper_step_and_resumes(form):
    module = Ridge()
    start = module.log_decay.item()
    module.configure_hyper_optimizer = lambda: form(scheduled(module, gamma=0.5))
    optimizer = HyperOptimizer(module, horizon=1)
    for _ in range(2):
        optimizer.step([torch.tensor(1.0, dtype=torch.float64)], 1.0)
    assert module.log_decay.item() == pytest.approx(start - 1.0 - 0.5)
    check_state_is_plain(optimizer.state_dict())
    resumed = HyperOptimizer(module, horizon=1)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    resumed.step([torch.tensor(1.0, dtype=torch.float64)], 1.0)
    assert module.log_decay.item() == pytest.approx(start - 1.0 - 0.5 - 0.25)


@pytest.mark.parametrize("form", [lambda one: {"optimizer": one}, lambda one: ([one], [])], ids=["dict", "lists"])
def test_an_optimizer_may_be_wrapped_as_in_lightning(form):
    module = Ridge()
    module.configure_hyper_optimizer = lambda: form(torch.optim.SGD(module.hyperparameters(), lr=1.0))
    start = module.log_decay.item()
    HyperOptimizer(module, horizon=1).step([torch.tensor(1.0, dtype=torch.float64)], 1.0)
    assert module.log_decay.item() == pytest.approx(start - 1.0)


def test_some_of_the_hyperparameters_in_several_groups_are_enough():
    module = Classifier()
    first, second, *rest = module.hyperparameters()
    groups = [{"params": [first], "lr": 0.1}, {"params": [second], "lr": 0.0}]
    optimizer = HyperOptimizer(Configured(module, torch.optim.SGD(groups, lr=1.0)), horizon=1)
    before = [first.clone(), second.clone(), *(tensor.clone() for tensor in rest)]
    optimizer.step([torch.ones_like(tensor) for tensor in before], 1.0)
    torch.testing.assert_close(first.detach(), before[0] - 0.1)
    assert all(torch.equal(a, b) for a, b in zip([second, *rest], before[1:], strict=True))
    assert all(tensor.grad is None for tensor in module.hyperparameters())


class Configured(nn.Module):
    """A module whose hyper-optimizer is given."""

    def __init__(self, module, optimizer):
        super().__init__()
        for name in ("hyperparameters", "named_hyperparameters", "named_inner_parameters"):
            setattr(self, name, getattr(module, name))
        for name in module._hyperparameter_names:
            setattr(self, name, getattr(module, name))
        self.configure_hyper_optimizer = lambda: optimizer


class Scalar(BilevelLightningModule, L.LightningModule):
    def __init__(self, value, dtype):
        super().__init__()
        self.register_hyperparameter("value", torch.tensor(value, dtype=dtype))


def test_by_default_there_is_no_learning_rate_and_each_registered_tensor_has_a_unit():
    module = Named()
    optimizer = HyperOptimizer(module, horizon=7)._optimizer
    assert isinstance(optimizer, PolyakRMSprop)
    assert optimizer.horizon == 7
    groups = {tuple(group["params"]): group["unit"] for group in optimizer.param_groups}
    assert groups == {(module.pixels,): pytest.approx(0.01), tuple(module.decay.parameters()): 1.0}


def test_the_default_sees_the_outer_loss_and_resumes():
    """Without the loss, the first step were 4 / 20 / 20 long."""
    module, other = Named(), Named()
    optimizer, resumed = HyperOptimizer(module, horizon=20), HyperOptimizer(other, horizon=20)
    before = module.pixels.clone()
    gradients = [torch.ones_like(tensor) for tensor in module.hyperparameters()]
    optimizer.step(gradients, 1e-3)
    assert 0.0 < float((module.pixels - before).abs().max()) < 1e-3
    check_state_is_plain(optimizer.state_dict())
    other.load_state_dict(module.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.step(gradients, 2e-3)
    resumed.step(gradients, 2e-3)
    assert all(torch.equal(a, b) for a, b in zip(module.hyperparameters(), other.hyperparameters(), strict=True))


@pytest.mark.parametrize(
    ("every", "solver", "expected"), [(5, None, 20.0), (10, Identity(0.1, horizon=300), 30.0), (500, None, 1.0)]
)
def test_the_default_knows_the_number_of_hyper_steps_in_a_horizon(every, solver, expected):
    seen = []

    class Seen(IFTHypergradient):
        def on_train_start(self, trainer, pl_module):
            super().on_train_start(trainer, pl_module)
            seen.append(self._stepper._optimizer._optimizer.horizon)

    module = Ridge()
    module.configure_hyper_optimizer = lambda: None
    with pytest.warns(UserWarning, match="made no hyper step"):
        quiet_trainer(callbacks=[Seen(every, solver=solver)]).fit(module)
    assert seen == [expected]


@pytest.mark.parametrize(
    ("horizon", "rate", "is_replaced"), [(20, 0.5, False), (20, 0.6, True), (2, 4.9, False), (2, 5.1, True)]
)
def test_a_step_that_is_far_too_long_is_replaced_by_a_default_one(horizon, rate, is_replaced):
    """Half a unit in a step, or ten in a horizon; the replacement is the first step of the default."""
    module, other = Scalar(9.0, torch.float64), Scalar(9.0, torch.float64)
    module.configure_hyper_optimizer = lambda: torch.optim.SGD(module.hyperparameters(), lr=rate)
    optimizer, default = HyperOptimizer(module, horizon), HyperOptimizer(other, horizon)
    gradient = torch.tensor(1.0, dtype=torch.float64)
    excess = optimizer.step([gradient], 2.0)
    default.step([gradient], 2.0)
    assert optimizer.replaced == is_replaced
    assert excess == pytest.approx(rate if is_replaced else 0.0)
    assert module.value.item() == (other.value.item() if is_replaced else pytest.approx(9.0 - rate))
    check_state_is_plain(optimizer.state_dict())
    resumed = HyperOptimizer(module, horizon)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert resumed.replaced == is_replaced
    before = module.value.detach().clone()
    optimizer.step([gradient], 2.0)
    expected = module.value.detach().clone()
    module.value.copy_(before)
    resumed.step([gradient], 2.0)
    assert torch.equal(module.value, expected)


def test_the_length_of_a_step_is_measured_in_the_unit_of_each_tensor():
    """A raw number of 0.01 is in danger from a step of 0.02, and a logarithm is not."""
    module = Named()
    sizes = {"pixels": 0.02, "decay": 0.02}
    for name, size in sizes.items():
        tensors = list(module.decay.parameters()) if name == "decay" else [module.pixels]
        module.configure_hyper_optimizer = lambda tensors=tensors, size=size: torch.optim.SGD(tensors, lr=size)
        optimizer = HyperOptimizer(module, horizon=20)
        optimizer.step([torch.ones_like(tensor) for tensor in module.hyperparameters()], 1.0)
        assert optimizer.replaced == (name == "pixels")


class Named(BilevelLightningModule, L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(2, 1)
        self.register_hyperparameter("pixels", torch.tensor([0.01, -0.01]))
        self.register_hyperparameter("decay", WeightDecay(self.net, "tensor"))


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01, initial_accumulator_value=0.1),  # has a state from the start
}


def made(dtype, kind, value=9.0):
    module = Scalar(value, dtype)
    module.configure_hyper_optimizer = lambda: OPTIMIZERS[kind](module.hyperparameters())
    return module, HyperOptimizer(module, horizon=20)


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_moves_as_float32_does(dtype, kind):
    """Gradients of 1e-3 have squares below the smallest number of float16 above zero, times 1 − β₂."""
    modules = {d: made(d, kind) for d in (dtype, torch.float32)}
    for step in range(100):
        for module, optimizer in modules.values():
            optimizer.step([torch.tensor(1e-3 * (1 + step % 3)).to(dtype).to(module.value.dtype)], 1.0)
    half, full = modules[dtype][0].value, modules[torch.float32][0].value
    assert full != 9.0
    assert torch.equal(half, full.to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_state_restores_the_master_copies(dtype):
    gradients = [torch.tensor(0.1 * (-1) ** k + 0.01, dtype=dtype) for k in range(20)]
    module, optimizer = made(dtype, "adam")
    for gradient in gradients[:10]:
        optimizer.step([gradient], 1.0)
    state, value = optimizer.state_dict(), module.value.item()
    check_state_is_plain(state)
    state = copy.deepcopy(state)
    resumed_module, resumed = made(dtype, "adam", value)
    resumed.load_state_dict(state)
    for gradient in gradients[10:]:
        optimizer.step([gradient], 1.0)
        resumed.step([gradient], 1.0)
        assert torch.equal(module.value, resumed_module.value)
    assert len(state["masters"]) == (dtype is not torch.float32)


def test_the_master_copy_takes_a_value_that_something_else_has_set():
    module, optimizer = made(torch.bfloat16, "sgd")
    optimizer.step([torch.tensor(1.0, dtype=torch.bfloat16)], 1.0)
    assert module.value == 9.0  # 8.99, rounded
    with torch.no_grad():
        module.value.fill_(2.0)
    optimizer.step([torch.tensor(0.0, dtype=torch.bfloat16)], 1.0)
    assert module.value.item() == pytest.approx(2.0 - 0.009, abs=2.0**-7)  # the momentum of the first step; rounding
    assert optimizer.state_dict()["masters"][0].item() == pytest.approx(1.991)


class Half(BilevelLightningModule, L.LightningModule):
    """A regression whose outer gradient has one sign; numbers near 9 are 2⁻⁴ apart in bfloat16."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(4))
        self.register_hyperparameter("scale", torch.tensor(9.0))

    def inner_loss(self, batch):
        x, y = batch
        return ((x @ self.w) - y * self.scale).square().mean() / 2

    def outer_loss(self, batch):
        return 1e-3 * (0.01 * (batch[0] @ self.w).square().mean() + self.scale)

    def configure_optimizers(self):
        return torch.optim.SGD(self.inner_parameters(), lr=0.01)


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_training_in_half_precision_tunes_as_float32_does(precision):
    x = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
    loader = DataLoader(TensorDataset(x, x.sum(1)), batch_size=8)
    ends = {}
    for kind in (precision, "32-true"):
        module = Half()
        callback = IFTHypergradient(1, solver=Identity(), curvature="hessian", outer_dataloader=list(loader))
        quiet_trainer(max_epochs=10, callbacks=[callback], precision=kind).fit(module, loader)
        ends[kind] = module.scale.item()
        assert callback.skipped == 0
    assert all(map(math.isfinite, ends.values()))
    # 40 steps of Adam by 0.01: the sign of the gradient is certain, its size is rounded
    assert ends["32-true"] == pytest.approx(8.6, abs=0.05)
    assert ends[precision] == pytest.approx(ends["32-true"], abs=2.0**-4)


def test_a_replacement_moves_only_what_the_optimizer_holds_and_each_module_is_measured_alone():
    module = Named()
    for held, other in ((module.pixels, module.decay.log_decay[0]), (module.decay.log_decay[0], module.pixels)):
        before = other.detach().clone()
        module.configure_hyper_optimizer = lambda held=held: torch.optim.SGD([held], lr=5.0)
        optimizer = HyperOptimizer(module, horizon=20)
        optimizer.step([torch.ones_like(tensor) for tensor in module.hyperparameters()], 1.0)
        assert optimizer.replaced == 1
        assert torch.equal(other, before)


def test_a_number_that_jumps_is_seen_beside_many_that_stay():
    module = Named()
    module.register_hyperparameter("many", torch.zeros(10_000))
    groups = [{"params": [module.many], "lr": 0.0}, {"params": list(module.decay.parameters()), "lr": 9.0}]
    module.configure_hyper_optimizer = lambda: torch.optim.SGD(groups, lr=1.0)
    optimizer = HyperOptimizer(module, horizon=20)
    assert optimizer.step([torch.ones_like(tensor) for tensor in module.hyperparameters()], 1.0) == pytest.approx(9.0)


def test_the_unit_of_a_tensor_that_grows_grows_with_it():
    """A step of 0.02 is far for a number of 0.01, and short for one of 100."""
    module = Named()
    module.configure_hyper_optimizer = lambda: torch.optim.SGD([module.pixels], lr=0.02)
    optimizer = HyperOptimizer(module, horizon=20)
    with torch.no_grad():
        module.pixels.fill_(100.0)
    optimizer.step([torch.ones_like(tensor) for tensor in module.hyperparameters()], 1.0)
    assert optimizer.replaced == 0


def test_a_module_may_have_something_else_called_unit():
    module = Named()
    layer = nn.Linear(1, 1)
    layer.unit = nn.Linear(1, 1)
    module.register_hyperparameter("layer", layer)
    HyperOptimizer(module, horizon=20).step([torch.ones_like(tensor) for tensor in module.hyperparameters()], 1.0)
