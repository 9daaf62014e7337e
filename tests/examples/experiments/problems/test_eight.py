"""Eight problems: their data, their starts, and that every hyperparameter has an influence."""

import math

import pytest
import torch
from torch.utils.data import DataLoader

from examples.experiments.common import quiet_trainer, random_batches
from examples.experiments.problems.eight import PROBLEMS
from lightning_ifthpo import IFTHypergradient

pytestmark = pytest.mark.filterwarnings(
    "ignore:The .*dataloader.* does not have many workers", "ignore:You defined a `validation_step`"
)


@pytest.fixture(params=PROBLEMS)
def kind(request):
    return PROBLEMS[request.param]


def rows(dataset):
    return {tuple(row) for row in dataset.tensors[0].flatten(1).tolist()}


def test_the_parts_are_disjoint_and_the_seed_decides_them(kind):
    split, same, other = kind.data(0), kind.data(0), kind.data(1)
    parts = [rows(part) for part in (split.train, split.outer, split.held_out)]
    # some lines of text are blank, or alike
    assert sum(map(len, parts)) - len(set.union(*parts)) <= (10 if kind is PROBLEMS["text"] else 0)
    assert torch.equal(split.train.tensors[0], same.train.tensors[0])
    assert not torch.equal(split.outer.tensors[0], other.outer.tensors[0])


def test_the_factor_moves_the_start(kind):
    split = kind.data(0)
    values = {}
    for factor in (1 / 30, 1.0, 30.0):
        torch.manual_seed(0)
        values[factor] = torch.cat([h.detach().flatten() for h in kind(factor, split).hyperparameters()])
    moves = [values[factor] - values[1.0] for factor in (1 / 30, 30.0)]
    if kind is PROBLEMS["distillation"]:
        torch.testing.assert_close(values[30.0], 30.0 * values[1.0])
    else:
        assert all(bool(move.any()) for move in moves)
        torch.testing.assert_close(moves[0], -moves[1])
        assert float(moves[1].max()) == pytest.approx(math.log(30), rel=1e-4)


def test_all_hyperparameters_move_in_a_few_steps(kind):
    torch.manual_seed(0)
    split = kind.data(0)
    module = kind(1.0, split)
    before = [h.detach().clone() for h in module.hyperparameters()]
    outer = DataLoader(split.outer, module.batch_size, shuffle=True)
    callback = IFTHypergradient(1, outer_dataloader=outer)
    batches = random_batches(split.train, min(module.batch_size, len(split.train)), 11, seed=0)
    quiet_trainer([callback], limit_val_batches=0).fit(module, batches)
    assert callback.summary().hyper_steps == 11
    assert callback.skipped == 0
    assert all(not torch.equal(h, b) for h, b in zip(module.hyperparameters(), before, strict=True))
