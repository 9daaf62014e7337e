"""Losses that are evaluated during training leave nothing behind."""

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn

from lightning_ifthpo import ExactGeN, IFTHypergradient
from lightning_ifthpo.hyperparameters import WeightDecay
from lightning_ifthpo.runtime.isolation import undisturbed
from tests.helpers.monitored import Plain
from tests.helpers.trainers import Classifier, during_training, same, trained


class Attention(Classifier):
    """Fused attention has no second derivative."""

    def __init__(self):
        super().__init__()
        self.net = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, dropout=0.0)
        self.decay = WeightDecay(self.net, initial=0.01)

    def inner_loss(self, batch):
        z = self.mark_outputs(self.net(batch[0].view(2, -1, 4)).flatten(0, 1)[:, :3])
        return F.cross_entropy(z, batch[1]) + self.decay()

    def outer_loss(self, batch):
        return F.cross_entropy(self.net(batch[0].view(2, -1, 4)).flatten(0, 1)[:, :3], batch[1])


@pytest.mark.filterwarnings("ignore:hyper step .* ended with status 'negative_curvature'")
@pytest.mark.parametrize("curvature", ["hessian", "gauss_newton", "finite_difference"])
def test_fused_attention_is_replaced_for_the_measurement(curvature):
    _, trainer, _ = trained([IFTHypergradient(4, curvature=curvature)], Attention)
    assert float(trainer.callback_metrics["hypergrad/indirect_norm"]) > 0


def test_compiled_modules_are_run_eagerly_for_the_measurement():
    def make():
        module = Classifier()
        module.net.compile(backend="aot_eager")
        return module

    _, trainer, _ = trained([IFTHypergradient(4)], make)
    assert float(trainer.callback_metrics["hypergrad/indirect_norm"]) > 0


def test_activation_checkpointing_gives_the_same_hypergradient():
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(Classifier):
        def outer_loss(self, batch):
            return F.cross_entropy(checkpoint(self.net, batch[0], use_reentrant=False), batch[1])

    def hyperparameters(module_type):
        module, _, _ = trained([IFTHypergradient(2)], module_type)
        return [p.clone() for p in module.hyperparameters()]

    assert same(hyperparameters(Checkpointed), hyperparameters(Classifier))


def test_nothing_stays_behind_after_an_exception_in_the_users_loss():
    class Fails(Classifier):
        def outer_loss(self, batch):
            if self.global_step >= 4:
                raise RuntimeError("user error")
            return super().outer_loss(batch)

    module = Fails()
    with pytest.raises(RuntimeError, match="user error"):
        trained([IFTHypergradient(4)], lambda: module, limit_val_batches=0)
    assert all(m.training for m in module.net.modules())
    assert not any(p.requires_grad for p in module.hyperparameters())
    assert "log" not in vars(module)


class Rude(Classifier):
    """Does in its losses what existing modules do: logs to the logger, changes its batch, differentiates by itself."""

    def inner_loss(self, batch):
        x, y = batch
        self.logger.log_metrics({"from inside": 1.0})
        self.logger.experiment.add_scalar("from inside", 1.0)
        x.mul_(0.5)
        x.requires_grad_()
        loss = super().inner_loss((x, y))
        (slope,) = torch.autograd.grad(self.net[0](x).tanh().sum(), x, create_graph=True)
        return loss + 0.01 * slope.square().sum()


@pytest.mark.filterwarnings("ignore:hyper step .* ended with status 'negative_curvature'")
def test_losses_may_log_change_their_batch_and_differentiate(tmp_path):
    results = []
    for callbacks in ([IFTHypergradient(1, on_failure="use", curvature="hessian")], []):
        logger = TensorBoardLogger(tmp_path / str(len(callbacks)))
        results.append(trained(callbacks, lambda: Rude(hyper_lr=0.0), logger=logger)[2].batches)
    assert same(*results)


def test_modules_made_in_the_first_forward_pass_are_made_by_training():
    class Lazy(Classifier):
        def inner_loss(self, batch):
            if not hasattr(self, "late"):
                self.late = nn.Linear(4, 3).to(self.device)
            return super().inner_loss(batch) + self.late(batch[0]).square().mean()

    def run(callbacks):
        return [batch[0] for batch in trained(callbacks, lambda: Lazy(hyper_lr=0.0))[2].batches]

    assert same(run([IFTHypergradient(1, on_failure="use")]), run([]))


class Attending(Plain):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, nhead=2, dim_feedforward=8, dropout=0.1, batch_first=True)

    def training_step(self, batch, batch_idx):
        x, y = batch
        x = self.layer(x[:, None, :].expand(-1, 3, -1))
        x = F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None])[:, 0]
        return F.cross_entropy(self.net(x.mean(1)), y)


class Compiled(Plain):
    def __init__(self):
        super().__init__()
        self.net = torch.compile(self.net, backend="aot_eager")


@pytest.mark.parametrize("curvature", ["hessian", "gauss_newton", "finite_difference"])
def test_an_outer_loss_with_recurrence_is_evaluated_without_cudnn(curvature):
    """cuDNN's recurrence has no backward pass in eval mode."""
    seen = []

    class Recurrent(Classifier):
        def __init__(self):
            super().__init__()
            self.recurrence = nn.GRU(4, 4, batch_first=True)

        def inner_loss(self, batch):
            return super().inner_loss((self.recurrence(batch[0][:, None])[0][:, 0], batch[1]))

        def outer_loss(self, batch):
            seen.append(torch.backends.cudnn.enabled)
            return super().outer_loss((self.recurrence(batch[0][:, None])[0][:, 0], batch[1]))

    trained([IFTHypergradient(4, curvature=curvature, on_failure="use")], Recurrent, limit_val_batches=0)
    assert seen
    assert not any(seen)


def test_a_method_that_the_user_has_put_on_the_module_stays():
    def action(trainer, module):
        module.log = own = lambda *arguments, **options: None
        with undisturbed(trainer, module, seed=0):
            assert module.log is not own
        assert module.log is own
        del module.log

    during_training(action)


@pytest.mark.parametrize("curvature", ["auto", "finite_difference", "hessian"])
def test_learning_rates_of_compiled_modules(curvature):
    """The first look takes a gradient, which the compiled graph would not keep."""
    trained([ExactGeN(1, curvature=curvature)], CompiledSmooth, max_epochs=1)


class CompiledSmooth(Classifier):
    def __init__(self):
        super().__init__()
        self.net = torch.compile(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)), backend="aot_eager")
        self.decay = WeightDecay(self.net, initial=0.01)
