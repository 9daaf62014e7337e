"""The losses of a module, in the precision that belongs to them."""

import pytest
import torch
import torch.nn.functional as F

from lightning_ifthpo import IFTHypergradient
from tests.helpers.trainers import Classifier, trained


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
