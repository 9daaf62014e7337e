"""States of inner optimizers in checkpoints of plain modules."""

import copy

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_ifthpo import BilevelLightningModule, IFTHypergradient
from lightning_ifthpo.runtime.optimizer_state import include_hyperparameters
from tests.helpers.trainers import loader, quiet_trainer, same

OPTIMIZERS = {
    "all parameters": lambda m: torch.optim.AdamW(m.parameters(), lr=0.01),
    "those that require a gradient": lambda m: torch.optim.AdamW(
        [p for p in m.parameters() if p.requires_grad], lr=0.01
    ),
    "groups": lambda m: torch.optim.AdamW(
        [
            {"params": [p for p in m.parameters() if p.ndim < 2], "weight_decay": 0.0},
            {"params": [p for p in m.parameters() if p.ndim >= 2]},
        ],
        lr=0.01,
    ),
}


class Plain(L.LightningModule):
    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
        self.kind = kind

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return OPTIMIZERS[self.kind](self)


class Bilevel(BilevelLightningModule, Plain):
    def __init__(self, kind, rate=0.0):
        super().__init__(kind)
        self.register_hyperparameter("log_decay", torch.tensor(-4.0))  # torch counts it before the net's parameters
        self.register_hyperparameter("scales", nn.BatchNorm1d(3))
        self.rate = rate

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss + 0.0 * self.log_decay.exp() * self.net[0].weight.square().sum()

    def outer_loss(self, batch):
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        return loss + self.log_decay.square() + self.scales.weight.square().sum() + self.scales.bias.sum()

    def outer_dataloader(self):
        return loader(20, batch_size=6, seed=1)

    def configure_hyper_optimizer(self):
        return torch.optim.SGD(self.hyperparameters(), lr=self.rate)


def fit(module, epochs, callbacks=(), **options):
    trainer = quiet_trainer(max_epochs=epochs, callbacks=list(callbacks), limit_val_batches=0)
    trainer.fit(module, loader(), **options)
    return trainer


@pytest.fixture(params=OPTIMIZERS)
def kind(request):
    return request.param


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
@pytest.mark.filterwarnings("ignore:the checkpoint has no values of 'log_decay'")
def test_a_plain_checkpoint_goes_on_as_bilevel(kind, tmp_path):
    """With its optimizer's state: training is bit for bit that of the plain module."""
    whole = Plain(kind)
    fit(whole, 4)
    fit(Plain(kind), 2).save_checkpoint(tmp_path / "plain.ckpt")
    resumed = Bilevel(kind)
    trainer = fit(resumed, 4, [IFTHypergradient(2, on_failure="use")], ckpt_path=tmp_path / "plain.ckpt")
    assert trainer.global_step == 16
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in whole.state_dict().items())


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
@pytest.mark.filterwarnings("ignore:hyper step .* ended with status 'negative_curvature'")
def test_a_bilevel_checkpoint_goes_on_as_bilevel(kind, tmp_path):
    whole = Bilevel(kind, 0.05)
    fit(whole, 4, [IFTHypergradient(2, on_failure="use")])
    fit(Bilevel(kind, 0.05), 2, [IFTHypergradient(2, on_failure="use")]).save_checkpoint(tmp_path / "bilevel.ckpt")
    resumed = Bilevel(kind, 0.05)
    fit(resumed, 4, [IFTHypergradient(2, on_failure="use")], ckpt_path=tmp_path / "bilevel.ckpt")
    assert resumed.log_decay != -4.0
    assert same(dict(resumed.state_dict()), dict(whole.state_dict()))


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
@pytest.mark.filterwarnings("ignore:Found keys that are not in the model state dict")
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_the_way_back(tmp_path):
    """Weights always; the whole run if the optimizer held only what requires a gradient."""
    kind = "those that require a gradient"
    bilevel = Bilevel(kind, 0.05)
    fit(bilevel, 2, [IFTHypergradient(2, on_failure="use")]).save_checkpoint(tmp_path / "bilevel.ckpt")
    loaded = Plain.load_from_checkpoint(tmp_path / "bilevel.ckpt", kind=kind, strict=False)
    assert same(dict(loaded.net.state_dict()), dict(bilevel.net.state_dict()))
    plain = Plain(kind)
    plain.strict_loading = False
    assert fit(plain, 4, ckpt_path=tmp_path / "bilevel.ckpt").global_step == 16
    frozen = Bilevel(kind)
    fit(frozen, 4, ckpt_path=tmp_path / "bilevel.ckpt")  # without the callback it trains likewise
    assert same(dict(plain.net.state_dict()), dict(frozen.net.state_dict()))


def test_states_that_do_not_fit_are_left_to_torch():
    module = Bilevel("all parameters")
    optimizer = module.configure_optimizers()
    for state in (optimizer.state_dict(), torch.optim.AdamW(module.net[0].parameters()).state_dict()):
        before = copy.deepcopy(state)
        include_hyperparameters(state, optimizer, module)
        assert state == before
