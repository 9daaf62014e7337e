"""The losses of a module, in the precision that belongs to them."""

import pytest
import torch
import torch.nn.functional as F

from lightning_ifthpo import IFTHypergradient
from lightning_ifthpo.runtime.losses import evaluating
from tests.helpers.device import DEVICE
from tests.helpers.trainers import Classifier, during_training, trained

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
            made = torch.zeros(3)
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
        with evaluating(trainer, module, 0, "hessian") as losses:
            for loss in (losses.outer(BATCH), losses.inner(BATCH)):
                loss()
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
        with evaluating(trainer, module, 0, "hessian") as losses:
            losses.inner(batch)()
        assert torch.equal(batch[0], BATCH[0])

    during_training(action, Greedy)


@pytest.mark.parametrize("curvature", ["hessian", "three_point"])
def test_gradients_are_on_and_kernels_have_a_second_derivative_unless_by_differences(curvature):
    def action(trainer, module):
        before = torch.backends.cuda.flash_sdp_enabled()
        with torch.no_grad(), evaluating(trainer, module, 0, curvature) as losses:
            assert losses.inner(BATCH)().requires_grad
            assert torch.backends.cuda.flash_sdp_enabled() == (before and curvature == "three_point")
        assert torch.backends.cuda.flash_sdp_enabled() == before

    during_training(action)


@pytest.mark.parametrize(("precision", "dtype"), [("32", torch.float32), ("inherit", torch.bfloat16)])
def test_autocast_is_left_out_unless_it_is_inherited(precision, dtype):
    def action(trainer, module):
        with evaluating(trainer, module, 0, "hessian", precision) as losses:
            seen = []
            hook = module.net.register_forward_hook(lambda *arguments: seen.append(arguments[2].dtype))
            losses.outer(BATCH)()
            hook.remove()
        assert seen == [dtype]

    during_training(action, precision="bf16-mixed")
