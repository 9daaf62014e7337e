"""What ExactGeN refuses, and what it survives."""

from itertools import pairwise

import pytest
import torch
from lightning.pytorch.callbacks import (
    StochasticWeightAveraging,
)
from lightning.pytorch.plugins import MixedPrecision
from torch import nn

from lightning_ifthpo import ExactGeN
from tests.helpers.device import DEVICE
from tests.helpers.learning_rates import Plain, fit
from tests.helpers.trainers import quiet_trainer


def test_a_nan_batch_is_not_blamed_on_the_rate():
    class Broken(Plain):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * torch.nan if self.trainer.fit_loop.total_batch_idx == 12 and torch.is_grad_enabled() else loss

        def on_before_optimizer_step(self, optimizer):
            for parameter in self.parameters():
                parameter.grad.nan_to_num_(0.0)

    trainer, rates = fit(Broken(), ExactGeN(final_decay=0.0))
    assert trainer.callback_metrics["gen/refused"] >= 1
    assert rates.rates[13] >= rates.rates[11] > 0


def test_a_loss_without_curvature_keeps_growth_bounded():
    class Linear(Plain):
        def training_step(self, batch, batch_idx):
            return self.net[0](batch[0]).mean()

    _, rates = fit(Linear(), ExactGeN(final_decay=0.0), max_epochs=30)
    steps = len(rates.rates)
    # 333-fold in a fifth of the run; a look at every second step or so grows the rate for both
    assert all(later <= 333.0 ** (2 * 5 / steps) * 1.01 * earlier for earlier, later in pairwise(rates.rates))


def test_steps_skipped_by_the_loss_scaler_leave_no_trace():
    """A scale of 1e38 overflows at once; the scaler halves it until steps are made."""
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=2.0**120)
    plugin = MixedPrecision("16-mixed", DEVICE.type, scaler)
    trainer, rates = fit(Plain(), ExactGeN(final_decay=0.0), plugins=[plugin], max_epochs=40)
    assert 0 < max(rates.rates) < 10
    assert rates.rates[0] != 1.0
    assert float(trainer.callback_metrics["gen/lr"]) > 0


def test_after_an_error_the_optimizer_has_no_hooks_left():
    class Failing(Plain):
        def training_step(self, batch, batch_idx):
            if self.trainer.fit_loop.total_batch_idx == 3:
                raise ArithmeticError("stop")
            return super().training_step(batch, batch_idx)

    trainer = quiet_trainer(callbacks=[ExactGeN()])
    with pytest.raises(ArithmeticError):
        trainer.fit(Failing())
    optimizer = trainer.optimizers[0]
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


class TwoOptimizers(Plain):
    def configure_optimizers(self):
        return [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in (self.net[0], self.net[2])]


class Manual(Plain):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


class NoOptimizer(Plain):
    def configure_optimizers(self):
        return None


class Complex(Plain):
    def __init__(self):
        super().__init__()
        self.phase = nn.Parameter(torch.ones(2, dtype=torch.complex64))


def test_weight_averaging_with_its_own_rates_is_refused():
    trainer = quiet_trainer(callbacks=[ExactGeN(), StochasticWeightAveraging(swa_lrs=0.1)])
    with pytest.raises(ValueError, match="use it or ExactGeN, not both"):
        trainer.fit(Plain())


@pytest.mark.filterwarnings("ignore:`LightningModule.configure_optimizers` returned `None`")
@pytest.mark.parametrize(
    ("module", "message"),
    [
        (lambda: Plain(torch.optim.LBFGS), "LBFGS cannot"),
        (lambda: Plain(torch.optim.Rprop), "the update of Rprop is not linear in its learning rate"),
        (NoOptimizer, "one optimizer, and there are 0"),
        (Manual, "Manual optimizes manually, and ExactGeN needs the Trainer"),
        (lambda: Plain(maximize=True), "this SGD maximizes"),
        (Complex, "Complex has complex weights"),
    ],
)
def test_what_it_cannot_do_is_refused_before_the_first_batch(module, message):
    with pytest.raises(ValueError, match=message):
        fit(module(), ExactGeN())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every_n_batches": 0}, "every_n_batches"),
        ({"rule": "magic"}, "rule"),
        ({"probe": "tomorrow"}, "probe"),
        ({"curvature": "fisher"}, "curvature"),
        ({"lr_min": 1.0, "lr_max": 0.1}, "lr_min <= lr_max"),
        ({"final_decay": -0.1}, "final_decay"),
    ],
    ids=str,
)
def test_the_constructor_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        ExactGeN(**options)


@pytest.mark.parametrize(("precision", "kind"), [("32-true", "three_point"), ("bf16-true", "hessian")])
def test_losses_in_half_precision_are_too_rough_for_differences(precision, kind):
    callback = ExactGeN()
    fit(Plain(), callback, precision=precision, max_epochs=1)
    assert callback._kind == kind
    if precision == "bf16-true":
        with pytest.raises(ValueError, match="curvature='three_point' needs float32"):
            fit(Plain(), ExactGeN(curvature="three_point"), precision=precision)
