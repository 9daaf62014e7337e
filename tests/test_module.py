"""The mixin."""

import copy
import pickle

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_ifthpo import BilevelLightningModule, IFTHypergradient, TrainingReport
from lightning_ifthpo.hyperparameters import SampleWeights, WeightDecay
from tests.helpers.trainers import Classifier, loader, quiet_trainer, trained


def test_existing_training_step_serves_as_inner_loss():
    class Existing(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)
            self.scale = nn.Parameter(torch.ones(3))

        def training_step(self, batch):
            x, y = batch
            self.log("existing", 1.0)
            return {"loss": F.cross_entropy(self.layer(x) * self.scale * self.temperature.exp(), y)}

        def validation_step(self, batch):
            self.log("existing_val", 2.0)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    class Bilevel(BilevelLightningModule, Existing):
        def __init__(self):
            super().__init__()
            self.register_hyperparameter("temperature", torch.zeros(()))

        def outer_loss(self, batch):
            return F.cross_entropy(self.layer(batch[0]), batch[1])

    module = Bilevel()
    trainer = quiet_trainer(callbacks=[IFTHypergradient(2, outer_dataloader=loader(seed=1), on_failure="use")])
    trainer.fit(module, loader(), loader(seed=2))
    assert module.temperature != 0
    assert {"existing", "existing_val"} <= trainer.callback_metrics.keys()


def test_default_steps_log_both_losses():
    _, trainer, _ = trained([])
    assert {"inner_loss", "outer_loss"} <= trainer.callback_metrics.keys()


def test_processes_agree_on_the_default_validation_loss(monkeypatch):
    """A training loss is not exchanged at each step, as in Lightning."""

    class Constant(BilevelLightningModule, L.LightningModule):
        def inner_loss(self, batch):
            return torch.zeros(())

        outer_loss = inner_loss

    module, asked = Constant(), {}
    monkeypatch.setattr(module, "log", lambda name, value, **options: asked.update({name: options["sync_dist"]}))
    module.training_step(None, 0)
    module.validation_step(None, 0)
    assert asked == {"inner_loss": False, "outer_loss": True}


def test_a_module_can_be_copied_and_pickled():
    module = Classifier()
    for clone in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert [n for n, _ in clone.named_hyperparameters()] == [n for n, _ in module.named_hyperparameters()]
        with torch.no_grad():
            clone.net[0].weight.add_(1.0)
        assert clone.decay() > module.decay()


def test_several_validation_loaders_and_any_step_signature():
    class Several(Classifier):
        def training_step(self, *arguments):
            return self.inner_loss(arguments[0])

        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            self.log(f"val_{dataloader_idx}", self.outer_loss(batch), add_dataloader_idx=False)

        def val_dataloader(self):
            return [loader(8), loader(8)]

    _, trainer, _ = trained([IFTHypergradient(4)], Several)
    assert {"val_0", "val_1"} <= trainer.callback_metrics.keys()


class Empty(BilevelLightningModule, L.LightningModule):
    pass


def test_hyperparameters_are_frozen_parameters_with_names():
    module = Empty()
    module.weights = nn.Linear(2, 1)
    module.register_hyperparameter("decay", torch.tensor([1.0, 2.0]))
    module.register_hyperparameter("augment", nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)))
    names = [name for name, _ in module.named_hyperparameters()]
    assert names == ["decay", "augment.0.weight", "augment.0.bias", "augment.1.weight", "augment.1.bias"]
    assert not any(p.requires_grad for p in module.hyperparameters())
    assert [name for name, _ in module.named_inner_parameters()] == ["weights.weight", "weights.bias"]
    assert len(list(module.inner_parameters())) == 2
    assert {"decay", "augment.1.bias"} <= module.state_dict().keys()


def test_a_registered_tensor_is_copied():
    module, value = Empty(), torch.tensor([1.0])
    module.register_hyperparameter("decay", value)
    value += 1
    assert module.decay.item() == 1.0


def test_hyperparameters_move_with_the_module():
    module = Empty()
    module.register_hyperparameter("decay", torch.tensor([1.0]))
    assert module.double().decay.dtype == torch.float64


def test_shared_hyperparameters_are_named_once():
    module, shared = Empty(), nn.Linear(2, 2)
    module.register_hyperparameter("a", shared)
    module.register_hyperparameter("b", shared)
    assert [name for name, _ in module.named_hyperparameters()] == ["a.weight", "a.bias"]


def test_an_optimizer_of_all_parameters_leaves_them_alone():
    module = Classifier()
    module.configure_optimizers = lambda: torch.optim.AdamW(module.parameters(), lr=0.1, weight_decay=0.5)
    before = [p.clone() for p in module.hyperparameters()]
    quiet_trainer().fit(module)
    assert all(torch.equal(p, b) for p, b in zip(module.hyperparameters(), before, strict=True))


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("a.b", torch.tensor(1.0), ValueError, "Python identifier, got 'a.b'"),
        ("trainer", torch.tensor(1.0), ValueError, "already has an attribute 'trainer'"),
        ("layer", torch.tensor(1.0), ValueError, "already has an attribute 'layer'"),
        ("decay", torch.tensor(1), TypeError, "hyperparameter 'decay': expected a real floating-point tensor"),
        ("decay", torch.tensor(1j), TypeError, "got torch.complex64"),
        ("decay", 0.1, TypeError, "expected a tensor, got float"),
        ("decay", nn.ReLU(), ValueError, "ReLU has no parameters to tune"),
    ],
    ids=["dotted", "taken by Lightning", "taken", "integer", "complex", "float", "empty module"],
)
def test_registration_refuses(name, value, error, message):
    module = Empty()
    module.layer = nn.Linear(1, 1)
    with pytest.raises(error, match=message):
        module.register_hyperparameter(name, value)


def test_a_name_cannot_be_registered_twice():
    module = Empty()
    module.register_hyperparameter("decay", torch.tensor(1.0))
    with pytest.raises(ValueError, match="'decay' is registered twice"):
        module.register_hyperparameter("decay", torch.tensor(1.0))


def test_inner_loss_without_anything_to_make_it_of():
    with pytest.raises(NotImplementedError, match=r"needs inner_loss\(batch\), or training_step"):
        Empty().inner_loss(None)
    with pytest.raises(NotImplementedError, match=r"needs outer_loss\(batch\)"):
        Empty().outer_loss(None)


def test_unfreeze_leaves_hyperparameters_frozen():
    module = Classifier()
    module.freeze()
    assert not any(p.requires_grad for p in module.parameters())
    assert module.unfreeze() is module
    assert not any(p.requires_grad for p in module.hyperparameters())
    assert all(p.requires_grad for p in module.inner_parameters())
    assert module.training


def test_a_checkpoint_without_hyperparameters_keeps_the_modules_own(tmp_path):
    """Also buffers of a registered module; those that the checkpoint has are loaded."""
    module = Classifier()
    trainer = quiet_trainer()
    trainer.fit(module, loader(), loader())
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    checkpoint = torch.load(tmp_path / "model.ckpt", weights_only=True)
    first, *others = [name for name, _ in module.named_hyperparameters()]
    checkpoint["state_dict"][first].fill_(-1.5)
    for name in others:
        del checkpoint["state_dict"][name]
    torch.save(checkpoint, tmp_path / "partial.ckpt")
    with pytest.warns(UserWarning, match=f"the checkpoint has no values of '{others[0]}'.*the module keeps its own"):
        loaded = Classifier.load_from_checkpoint(tmp_path / "partial.ckpt")
    values = dict(loaded.named_hyperparameters())
    assert values[first].item() == -1.5
    assert torch.equal(values[others[0]], dict(Classifier().named_hyperparameters())[others[0]])
    assert torch.equal(loaded.net[0].weight, module.net[0].weight)


def test_a_missing_weight_is_still_an_error(tmp_path):
    trainer = quiet_trainer()
    trainer.fit(Classifier(), loader(), loader())
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    checkpoint = torch.load(tmp_path / "model.ckpt", weights_only=True)
    del checkpoint["state_dict"]["net.0.weight"]
    torch.save(checkpoint, tmp_path / "partial.ckpt")
    with pytest.raises(RuntimeError, match=r"(?s)Missing key.*net\.0\.weight"):
        Classifier.load_from_checkpoint(tmp_path / "partial.ckpt")


def test_checkpoints_carry_hyperparameters(tmp_path):
    module = Classifier()
    with torch.no_grad():
        module.decay.log_decay[0].fill_(-1.5)
    trainer = quiet_trainer()
    trainer.fit(module, loader(), loader())
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    assert Classifier.load_from_checkpoint(tmp_path / "model.ckpt").decay.log_decay[0].item() == -1.5


def test_values_are_plain_and_in_natural_units():
    class Tuned(BilevelLightningModule, L.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(2, 1)
            self.register_hyperparameter("one", torch.tensor([-2.0]))
            self.register_hyperparameter("several", torch.tensor([[1.0, 2.0]]))
            self.register_hyperparameter("decay", WeightDecay(self.net, "tensor", initial=0.25))
            self.register_hyperparameter("weights", SampleWeights(3))
            self.register_hyperparameter("plain", nn.ParameterDict({"a": torch.tensor(1.0), "b": torch.zeros(2)}))

    module = Tuned()
    values = module.hyperparameter_values()
    assert values["one"] == -2.0
    assert values["several"].tolist() == [[1.0, 2.0]]
    assert values["decay"] == {"weight": pytest.approx(0.25), "bias": pytest.approx(0.25)}
    assert values["weights"].tolist() == [1.0, 1.0, 1.0]
    assert values["plain"]["a"] == 1.0
    assert values["plain"]["b"].tolist() == [0.0, 0.0]
    with torch.no_grad():
        module.several += 1.0
    assert values["several"].tolist() == [[1.0, 2.0]]  # a copy
    again = WeightDecay(module.net, "tensor", initial=values["decay"])
    assert torch.allclose(again(), module.decay())


def loaded():
    module = Classifier()
    module.load_state_dict(Classifier().state_dict())
    return module


@pytest.mark.parametrize(
    ("make", "callbacks", "is_told"),
    [
        (Classifier, [], True),
        (Classifier, [IFTHypergradient(1)], False),
        (lambda: Classifier().freeze_hyperparameters(), [], False),
        (loaded, [], False),
        (lambda: copy.deepcopy(Classifier()), [], False),
    ],
    ids=["forgotten", "tuned", "frozen", "loaded", "copied"],
)
def test_a_module_that_nothing_tunes_says_so(make, callbacks, is_told, caplog, tmp_path):
    report = TrainingReport(tmp_path / "report.html")
    with caplog.at_level("INFO", logger="lightning.pytorch"):
        quiet_trainer(callbacks=[*callbacks, report], max_epochs=3).fit(make())
    assert ("Classifier: nothing tunes the hyperparameters 'decay', which stay" in caplog.text) == is_told
    assert ("nothing tunes the hyperparameters" in [finding.kind for finding in report.findings]) == is_told


def test_a_module_without_hyperparameters_says_nothing(caplog):
    class Without(Classifier):
        def register_hyperparameter(self, name, value):
            self.decay = lambda: 0.0

    with caplog.at_level("INFO", logger="lightning.pytorch"):
        quiet_trainer().fit(Without())
    assert "nothing tunes" not in caplog.text
