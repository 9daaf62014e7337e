"""A clear error before anything is trained on the first batch."""

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ifthpo import BilevelLightningModule, IFTHypergradient
from lightning_ifthpo.hyperparameters import WeightDecay
from lightning_ifthpo.solvers import ConjugateGradient
from tests.helpers.scaled import NoOuterLoss, Plain, Scaled
from tests.helpers.trainers import Classifier, loader, quiet_trainer


class NoHyperparameters(BilevelLightningModule, Plain):
    def outer_loss(self, batch):
        return self.training_step(batch, 0)


class NoInnerLoss(BilevelLightningModule, L.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.register_hyperparameter("scale", torch.ones(3))

    def outer_loss(self, batch):
        return F.cross_entropy(self.layer(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class LearningRate(Scaled):
    def __init__(self):
        super().__init__()
        self.register_hyperparameter("learning_rate", torch.tensor(0.1))


class UnusedModule(Scaled):
    def __init__(self):
        super().__init__()
        self.register_hyperparameter("augment", nn.Linear(2, 2))


class VectorLoss(Scaled):
    def inner_loss(self, batch):
        return F.cross_entropy(self.layer(batch[0]) * self.scale, batch[1], reduction="none")


class NanLoss(Scaled):
    def inner_loss(self, batch):
        return super().inner_loss(batch) * torch.nan


class DetachedLoss(Scaled):
    def inner_loss(self, batch):
        return super().inner_loss(batch).detach()


class DetachedOuterLoss(Scaled):
    def outer_loss(self, batch):
        return super().outer_loss(batch).detach()


class InfiniteOuterLoss(Scaled):
    def outer_loss(self, batch):
        return super().outer_loss(batch) / 0.0


class FloatLoss(Scaled):
    def inner_loss(self, batch):
        return float(super().inner_loss(batch).detach())


class NoLossInDict(NoOuterLoss):
    outer_loss = Scaled.outer_loss

    def training_step(self, batch, batch_idx):
        return {"objective": super().training_step(batch, batch_idx)}


class Manual(NoOuterLoss):
    outer_loss = Scaled.outer_loss

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        raise AssertionError("must not be reached")


class InTheOptimizer(Scaled):
    def __init__(self):
        super().__init__()
        self.scale.requires_grad_(True)


class TooMuchDecay(Classifier):
    def __init__(self):
        super().__init__(lr=0.5)
        self.decay = WeightDecay(self.net, initial=0.1, maximum=4.0)


class StaleDecay(Classifier):
    def __init__(self):
        super().__init__()
        self.net[0].weight = nn.Parameter(torch.zeros(8, 4))


class Maximizing(Scaled):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, maximize=True)


def empty_loader():
    return DataLoader(TensorDataset(torch.zeros(0, 4)), batch_size=2)


CASES = {
    "no mixin": (Plain, {}, TypeError, "needs a BilevelLightningModule, got Plain; add the mixin"),
    "no hyperparameter": (NoHyperparameters, {}, ValueError, "call self.register_hyperparameter"),
    "no outer loss": (NoOuterLoss, {}, ValueError, r"has no outer_loss\(batch\)"),
    "no inner loss": (NoInnerLoss, {}, ValueError, r"neither inner_loss\(batch\) nor training_step"),
    "learning rate": (LearningRate, {}, ValueError, "'learning_rate' does not influence.*ExactGeN or a sweep"),
    "unused module": (UnusedModule, {}, ValueError, "'augment' does not influence"),
    "vector loss": (VectorLoss, {}, ValueError, r"inner_loss: expected a scalar, got shape \(8,\)"),
    "NaN loss": (NanLoss, {}, ValueError, "inner_loss is nan on the first batch"),
    "detached loss": (DetachedLoss, {}, ValueError, "inner_loss is detached"),
    "detached outer loss": (DetachedOuterLoss, {}, ValueError, "outer_loss is detached"),
    "infinite outer loss": (InfiniteOuterLoss, {}, ValueError, "outer_loss is inf on the first batch"),
    "float loss": (FloatLoss, {}, TypeError, "inner_loss: expected a scalar tensor, got float"),
    "no loss in the dict": (NoLossInDict, {}, TypeError, "dict with the key 'loss'"),
    "Gauss–Newton without outputs": (Scaled, {"curvature": "gauss_newton"}, ValueError, "call mark_outputs"),
    "manual optimization": (Manual, {}, ValueError, r"optimizes manually.*define inner_loss\(batch\)"),
    "in the inner optimizer": (InTheOptimizer, {}, ValueError, r"'scale' requires a gradient.*inner_parameters"),
    "empty outer data": (Scaled, {"outer_dataloader": empty_loader()}, ValueError, "outer data loader is empty"),
    "no outer data": (Scaled, {"outer_dataloader": None}, ValueError, "no outer data: define outer_dataloader"),
    "stale decay": (StaleDecay, {}, ValueError, "'decay': WeightDecay decays tensors that are no longer parameters"),
    "maximizing": (Maximizing, {}, ValueError, "the inner optimizer maximizes"),
    "decay beyond stability": (TooMuchDecay, {}, ValueError, r"learning rate 0.5 a decay of 2/lr = 4"),
}


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
@pytest.mark.parametrize("name", CASES)
def test_a_clear_error_before_the_first_batch(name):
    make, options, error, message = CASES[name]
    module = make()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    callback = IFTHypergradient(1, **({"outer_dataloader": loader(seed=1)} | options))
    trainer = quiet_trainer(callbacks=[callback])
    with pytest.raises(error, match=rf"(?s){message}"):
        trainer.fit(module, loader(), loader(seed=3) if name == "decay beyond stability" else None)
    assert trainer.global_step == 0
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every_n_batches": 0}, "every_n_batches to be an integer >= 1"),
        ({"curvature": "kronecker"}, "expected curvature to be one of"),
        ({"on_failure": "ignore"}, "expected on_failure to be one of"),
        ({"precision": "16"}, "expected precision to be one of"),
        ({"max_overhead": 0.0}, "max_overhead > 0"),
        ({"start_after_batches": -1}, "start_after_batches"),
    ],
)
def test_the_constructor_checks_its_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        IFTHypergradient(**options)


@pytest.mark.parametrize("solver", [ConjugateGradient, "cg"], ids=["class", "name"])
def test_the_solver_must_be_an_instance(solver):
    with pytest.raises(TypeError, match="expected solver to be an instance"):
        IFTHypergradient(solver=solver)


def test_a_partly_used_module_is_no_error():
    class PartlyUsed(Scaled):
        def __init__(self):
            super().__init__()
            self.register_hyperparameter("extra", nn.Linear(4, 3))  # of which only the bias is used

        def inner_loss(self, batch):
            return super().inner_loss(batch) + (self.layer.bias * self.extra.bias).sum()

    module = PartlyUsed()
    weight = module.extra.weight.clone()
    callback = IFTHypergradient(1, outer_dataloader=loader(seed=1), on_failure="use")
    quiet_trainer(callbacks=[callback]).fit(module, loader(), loader(seed=2))
    assert torch.equal(module.extra.weight, weight)
