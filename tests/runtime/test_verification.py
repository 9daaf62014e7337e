"""What the first batch shows about a module's losses."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_ifthpo import IFTHypergradient
from lightning_ifthpo.hyperparameters import InputNoise, LabelSmoothing, WeightDecay
from lightning_ifthpo.runtime.distributed import Ranks
from lightning_ifthpo.runtime.losses import ModuleLosses
from lightning_ifthpo.runtime.verification import trusted_operator
from tests.helpers.trainers import Classifier, during_training, loader, quiet_trainer


class Half(torch.autograd.Function):
    """Passes values, and half of their gradients."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient / 2


class Tuned(Classifier):
    """A classifier whose training loss has a factor, made of one hyperparameter in the way that `through` says."""

    def __init__(self, through, start=0.3):
        super().__init__()
        self.through = through
        self.register_hyperparameter("factor", torch.tensor(start))

    def inner_loss(self, batch):
        return super().inner_loss(batch) * self.through(self.factor)


def said_about_slopes(module, **options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quiet_trainer(callbacks=[IFTHypergradient(1, **options)], limit_train_batches=2, limit_val_batches=0).fit(
            module
        )
    return [str(warning.message) for warning in caught if "as its derivative says" in str(warning.message)]


WRONG = {
    "half of it detached": lambda factor: factor + factor.detach(),
    "relative to itself": lambda factor: factor / (2 * factor.detach().square()),
    "straight through": lambda factor: factor + (factor.round() - factor).detach() + factor.square(),
    "wrong backward pass": Half.apply,
}
RIGHT = {
    "as it is": lambda factor: factor,
    "in an exponential": torch.exp,
    "hardly": lambda factor: 1.0 + 1e-9 * factor,
    "beside a constant part": lambda factor: factor + torch.ones_like(factor).detach(),
    "clamped at its bound": lambda factor: 1.0 + factor.clamp(max=0.2),
    "with a kink": lambda factor: 1.0 + (factor - 0.3).abs(),
    "at zero slope": lambda factor: 1.0 + (factor - 0.3).square(),
}


@pytest.mark.parametrize("curvature", ["auto", "hessian", "finite_difference"])
@pytest.mark.parametrize("through", WRONG)
def test_a_hyperparameter_that_is_partly_detached_is_reported_once(through, curvature):
    (message,) = said_about_slopes(Tuned(WRONG[through]), curvature=curvature)
    assert message.startswith("IFTHypergradient: inner_loss does not change with the hyperparameters")


@pytest.mark.parametrize("through", RIGHT)
def test_a_hyperparameter_whose_derivative_is_right_is_not_reported(through):
    assert said_about_slopes(Tuned(RIGHT[through])) == []


class Several(Classifier):
    """Hyperparameters of several kinds and scales, behind dropout and in the data."""

    def __init__(self):
        super().__init__()
        self.register_hyperparameter("noise", InputNoise((4,)))
        self.register_hyperparameter("smoothing", LabelSmoothing(classes=3))
        self.register_hyperparameter("weights", nn.Parameter(torch.zeros(1000)))

    def inner_loss(self, batch):
        x, y = batch
        logits = self.mark_outputs(self.net(self.noise(x)))
        losses = F.cross_entropy(logits, self.smoothing(y), reduction="none")
        return (losses * self.weights[: len(x)].exp()).mean() + self.decay()


def test_healthy_hyperparameters_of_several_kinds_are_not_reported():
    assert said_about_slopes(Several()) == []


class Convolutional(Classifier):
    """The four numbers of an example are an image."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 8, 2), nn.Flatten(), nn.Linear(8, 3))
        self.decay = WeightDecay(self.net, initial=0.01)


@pytest.mark.parametrize("kind", [Classifier, Convolutional])
def test_forward_mode_is_chosen_where_there_are_convolutions(kind):
    """Without a stopwatch, so that runs repeat."""

    def action(trainer, module):
        losses = ModuleLosses(trainer, module, Ranks(trainer))
        with losses.session("gauss_newton"):
            batch = [tensor.to(module.device) for tensor in next(iter(loader()))]
            loss = losses.inner(batch)
            trusted_operator(losses, loss, "gauss_newton", "the test")
            assert losses.inner(batch).forward_mode == (kind is Convolutional)
        chosen.append(kind)

    chosen = []
    during_training(action, kind)
    assert chosen == [kind]
