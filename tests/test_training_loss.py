"""The loss that weights minimize."""

from types import SimpleNamespace

import pytest
import torch

from lightning_ifthpo.core.loss import NoLossError
from lightning_ifthpo.training_loss import training_loss

BATCH = torch.tensor(2.0)
TRAINER = SimpleNamespace(fit_loop=SimpleNamespace(batch_idx=3))


def module(**methods):
    return SimpleNamespace(trainer=TRAINER, **methods)


@pytest.mark.parametrize(
    ("methods", "expected"),
    [
        ({"training_step": lambda batch: batch + 1}, 3.0),
        ({"training_step": lambda batch, batch_idx: batch + batch_idx}, 5.0),
        ({"training_step": lambda *arguments: {"loss": arguments[0] * 2}}, 4.0),
        ({"inner_loss": lambda batch: batch * 3, "training_step": lambda batch: None}, 6.0),
    ],
    ids=["batch alone", "with its index", "dict", "inner loss"],
)
def test_it_is_the_inner_loss_or_that_of_the_training_step(methods, expected):
    assert training_loss(module(**methods), BATCH).item() == expected


@pytest.mark.parametrize(
    ("methods", "error", "message"),
    [
        ({"training_step": lambda batch: None}, NoLossError, "training_step returned None, so there is no loss"),
        ({"inner_loss": lambda batch: None}, NoLossError, "inner_loss returned None, so there is no loss"),
        ({"training_step": lambda batch: {"value": batch}}, TypeError, "a dict with the key 'loss', got dict"),
        ({"training_step": lambda batch: {"loss": None}}, TypeError, "a dict with the key 'loss', got dict"),
        ({"training_step": lambda batch: 2.0}, TypeError, "got float"),
    ],
    ids=["None", "None from inner_loss", "no loss", "None in the dict", "float"],
)
def test_without_a_loss_it_says_so(methods, error, message):
    with pytest.raises(error, match=message):
        training_loss(module(**methods), BATCH)
