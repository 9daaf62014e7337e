"""Whatever unfreezes hyperparameters during training, only hyper steps move them."""

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import BackboneFinetuning, BaseFinetuning, Callback
from torch import nn

from lightning_ifthpo import IFTHypergradient, SharpnessMonitor
from tests.checks import check_leaves_training_untouched
from tests.helpers.trainers import Classifier, Recorder, quiet_trainer


class Fixed(Classifier):
    """Trained by an optimizer over all parameters that decays them; hyper steps have a rate of zero."""

    def __init__(self):
        super().__init__(hyper_lr=0.0)
        self.backbone = self.net[0]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, weight_decay=0.1, momentum=0.9)


class Manual(Fixed):
    def __init__(self, *, lightning=True):
        super().__init__()
        self.automatic_optimization, self.lightning = False, lightning

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers(use_pl_optimizer=self.lightning)
        optimizer.zero_grad()
        loss = self.inner_loss(batch)
        self.manual_backward(loss) if self.lightning else loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters(), 0.5)
        optimizer.step()
        return {"loss": loss.detach()}


def unfreeze(module):
    module.unfreeze()


def require_gradients(module):
    module.requires_grad_(True)


def require_one(module):
    module.decay.log_decay[0].requires_grad_(True)


def make_trainable(module):
    BaseFinetuning.make_trainable(module)


HOOKS = ("on_train_epoch_start", "on_train_batch_start", "on_after_backward", "on_before_optimizer_step")


class In(Callback):
    """Acts in one hook from the second batch on."""

    def __init__(self, hook, action):
        setattr(self, hook, lambda trainer, module, *_: action(module) if trainer.global_step else None)


class InTrainingStep(Fixed):
    def training_step(self, batch, batch_idx):
        require_gradients(self)
        return super().training_step(batch, batch_idx)


def fit(callbacks, make, **options):
    torch.manual_seed(7)
    module, recorder = make(), Recorder()
    before = [tensor.clone() for tensor in module.hyperparameters()]
    quiet_trainer(max_epochs=3, callbacks=[*callbacks, recorder], **options).fit(module)
    assert all(torch.equal(a, b) for a, b in zip(module.hyperparameters(), before, strict=True))
    assert all(tensor.grad is None for tensor in module.hyperparameters())
    return recorder


PLAIN = {"clipped": {"gradient_clip_val": 0.5}, "accumulated": {"accumulate_grad_batches": 2}}


@pytest.mark.filterwarnings("ignore:hyperparameter .* was unfrozen")
@pytest.mark.parametrize("options", PLAIN)
@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("action", [unfreeze, require_gradients, require_one, make_trainable])
def test_no_hook_hands_them_to_the_training_optimizer(hook, action, options):
    callbacks = [In(hook, action), IFTHypergradient(2, on_failure="use"), SharpnessMonitor(4, max_overhead=None)]
    watched = fit(callbacks, Fixed, **PLAIN[options])
    check_leaves_training_untouched(watched, fit([], Fixed, **PLAIN[options]))


class ThawedBefore(Fixed):
    """Unfreezes everything after the callback has frozen it, and before the first batch."""

    def __init__(self, hook):
        super().__init__()
        own = getattr(self, hook)
        setattr(self, hook, lambda *arguments: (require_gradients(self), own(*arguments))[1])


@pytest.mark.filterwarnings("ignore:hyperparameter .* was unfrozen")
@pytest.mark.parametrize("hook", ["configure_optimizers", "on_fit_start", "on_train_start"])
def test_it_does_not_help_to_be_early(hook):
    fit([IFTHypergradient(2, on_failure="use")], lambda: ThawedBefore(hook), gradient_clip_val=0.5)


@pytest.mark.filterwarnings("ignore:hyperparameter .* was unfrozen")
def test_training_step_neither():
    watched = fit([IFTHypergradient(2, on_failure="use")], InTrainingStep, gradient_clip_val=0.5)
    check_leaves_training_untouched(watched, fit([], Fixed, gradient_clip_val=0.5))


@pytest.mark.filterwarnings("ignore:hyperparameter .* was unfrozen")
@pytest.mark.parametrize("lightning", [True, False], ids=["Lightning's optimizer", "torch's optimizer"])
def test_manual_optimization_neither(lightning):
    def make():
        return Manual(lightning=lightning)

    callbacks = [In("on_train_batch_start", require_gradients), IFTHypergradient(2, on_failure="use")]
    check_leaves_training_untouched(fit(callbacks, make), fit([], make))


class WholeModule(BaseFinetuning):
    """Thaws everything, and gives it to the optimizer."""

    def freeze_before_training(self, module):
        self.freeze(module.backbone)

    def finetune_function(self, module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(module, optimizer, lr=0.1)


class Head(Fixed):
    """Its optimizer begins with the head."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.net[-1].parameters(), lr=0.1, weight_decay=0.1)


@pytest.mark.parametrize("finetuning", [WholeModule, lambda: BackboneFinetuning(1)], ids=["whole", "backbone"])
@pytest.mark.filterwarnings("ignore:hyperparameter .* was unfrozen")
@pytest.mark.filterwarnings("ignore:The provided params to be frozen already exist within another group")
def test_finetuning_callbacks_neither(finetuning):
    class Module(Head):
        def __init__(self):
            super().__init__()
            self.backbone.register_module("decay", self.decay)  # inside what is thawed

    fit([finetuning(), IFTHypergradient(2, on_failure="use")], Module)


def test_it_is_said_once_and_not_for_unfreeze():
    with pytest.warns(UserWarning, match="'decay.log_decay.0' was unfrozen during training") as caught:
        fit([In("on_train_batch_start", require_gradients), IFTHypergradient(2, on_failure="use")], Fixed)
    assert sum("was unfrozen" in str(warning.message) for warning in caught) == 1
    fit([In("on_train_batch_start", unfreeze), IFTHypergradient(2, on_failure="use")], Fixed)  # warnings are errors


def test_after_the_fit_gradients_are_the_users_again():
    module = Fixed()
    quiet_trainer(callbacks=[IFTHypergradient(2)]).fit(module)
    module.requires_grad_(True)
    (F.mse_loss(module.net[0].weight, torch.zeros(8, 4)) + module.decay()).backward()
    assert all(tensor.grad is not None for tensor in module.hyperparameters() if isinstance(tensor, nn.Parameter))
