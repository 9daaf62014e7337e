"""The losses of a module, in the precision that belongs to them."""

import pytest
import torch
import torch.nn.functional as F

from lightning_ifthpo import IFTHypergradient
from lightning_ifthpo.runtime.distributed import Ranks
from lightning_ifthpo.runtime.losses import ModuleLosses, trainable
from tests.helpers.device import DEVICE
from tests.helpers.trainers import Classifier, during_training, trained

KINDS = ("inner", "outer")
BATCH = [torch.randn(8, 4, generator=torch.Generator().manual_seed(0)).to(DEVICE), torch.arange(8, device=DEVICE) % 3]


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
            made = torch.zeros(3, device=self.device)
            assert made.dtype == torch.float64
            return F.cross_entropy(self.net(batch[0]) + made, batch[1])

    module, _, _ = trained([IFTHypergradient(4)], Made, precision="64-true")
    assert next(module.hyperparameters()).dtype == torch.float64


def test_the_inner_loss_is_evaluated_in_the_modes_it_was_found_in_and_the_outer_loss_in_eval_mode():
    modes = []

    class Spy(Classifier):
        def inner_loss(self, batch):
            modes.append(("inner", self.net.training, self.net[1].training))
            return super().inner_loss(batch)

        def outer_loss(self, batch):
            modes.append(("outer", self.net.training, self.net[1].training))
            return super().outer_loss(batch)

    def action(trainer, module):
        module.net[1].eval()
        losses = ModuleLosses(trainer, module, Ranks(trainer))
        with losses.session("hessian"):
            for loss in (losses.outer(BATCH), losses.inner(BATCH)):
                loss.evaluate()
        assert module.net.training
        assert not module.net[1].training
        module.net[1].train()

    during_training(action, Spy)
    assert modes[:2] == [("outer", False, False), ("inner", True, False)]


def test_batches_are_copied_for_each_evaluation():
    class Greedy(Classifier):
        def inner_loss(self, batch):
            batch[0].mul_(0.5)
            return super().inner_loss(batch)

    def action(trainer, module):
        batch = [tensor.clone() for tensor in BATCH]
        losses = ModuleLosses(trainer, module, None)
        with losses.session("hessian"):
            losses.inner(batch).evaluate()
        assert torch.equal(batch[0], BATCH[0])

    during_training(action, Greedy)


@pytest.mark.parametrize("curvature", ["hessian", "three_point"])
def test_gradients_are_on_and_kernels_have_a_second_derivative_unless_by_differences(curvature):
    def action(trainer, module):
        before = torch.backends.cuda.flash_sdp_enabled()
        losses = ModuleLosses(trainer, module, None)
        with torch.no_grad(), losses.session(curvature):
            assert losses.inner(BATCH).evaluate()[0].requires_grad
            assert torch.backends.cuda.flash_sdp_enabled() == (before and curvature == "three_point")
        assert torch.backends.cuda.flash_sdp_enabled() == before

    during_training(action)


@pytest.mark.parametrize(("precision", "dtype"), [("32", torch.float32), ("inherit", torch.bfloat16)])
def test_autocast_is_left_out_unless_it_is_inherited(precision, dtype):
    def action(trainer, module):
        losses = ModuleLosses(trainer, module, None, precision)
        with losses.session("hessian"):
            seen = []
            hook = module.net.register_forward_hook(lambda *arguments: seen.append(arguments[2].dtype))
            losses.outer(BATCH).evaluate()
            hook.remove()
        assert seen == [dtype]

    during_training(action, precision="bf16-mixed")


def test_every_step_and_seed_draws_other_numbers_and_a_repeated_one_the_same():
    class Random(Classifier):
        def outer_loss(self, batch):
            drawn.append(torch.rand(()).item())
            return super().outer_loss(batch)

    drawn = []

    def action(trainer, module):
        losses = ModuleLosses(trainer, module, None)
        for seed, step in ((0, 0), (0, 0), (0, 1), (1, 0)):
            with losses.session("hessian", seed=seed, step=step):
                losses.outer(BATCH).evaluate()

    during_training(action, Random)
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) == 3


def test_a_loss_knows_its_weights_its_name_and_this_process_s_share():
    def action(trainer, module):
        ranks = Ranks(trainer)
        ranks.share_of = lambda batch: 0.25
        inner, outer = (getattr(ModuleLosses(trainer, module, ranks), name)(BATCH, scale=8.0) for name in KINDS)
        weights = list(module.inner_parameters())
        assert all(one is other for one, other in zip(inner.parameters, weights, strict=True))
        assert (inner.name, outer.name) == ("inner_loss", "outer_loss")
        assert [(loss.share, loss.scale, loss.all_reduce) for loss in (inner, outer)] == [(0.25, 8.0, None)] * 2

    during_training(action)


def test_trainable_weights_are_those_that_require_a_gradient_and_no_hyperparameters():
    module = Classifier()
    module.net[0].requires_grad_(False)
    module.decay.requires_grad_(True)
    assert [id(weight) for weight in trainable(module)] == [id(weight) for weight in module.net[1:].parameters()]
    plain = torch.nn.Linear(2, 1)
    assert trainable(plain) == list(plain.parameters())
