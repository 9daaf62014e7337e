"""Which entries of hyperparameters have a hypergradient."""

import copy

import pytest
import torch

from lightning_ifthpo.callbacks.reach import Reach
from tests.checks import check_state_is_plain

ROW = torch.tensor([0.0, 2.0, 2.0, 0.0, 2.0])


def reach_of(*gradients):
    reach = Reach({})
    for gradient in gradients:
        reach.add([gradient], [int(torch.count_nonzero(gradient))])
    return reach


@pytest.mark.parametrize(
    ("gradient", "alike"),
    [
        (ROW, True),
        (-ROW, True),
        (ROW * torch.tensor([1.0, 1.0, 1.0 + 1e-6, 1.0, 1.0]), True),
        (ROW * torch.tensor([1.0, 1.0, 1.01, 1.0, 1.0]), False),
        (ROW * torch.tensor([1.0, 1.0, -1.0, 1.0, 1.0]), False),
        (ROW[:4], False),
        (torch.ones(5), False),
        (ROW[:, None], False),
        (torch.tensor(2.0), False),
        (torch.zeros(5), False),
    ],
    ids=["alike", "negative", "rounded", "apart", "both signs", "two", "all of them", "a matrix", "a number", "none"],
)
def test_it_knows_entries_that_are_alike_at_the_first_hyper_step(gradient, alike):
    assert reach_of(gradient, torch.rand_like(gradient)).alike == [alike]


def test_it_counts_entries_at_once_and_in_all():
    other = ROW.roll(1)
    assert (reach_of(ROW, ROW).most, reach_of(ROW, ROW).reached) == ([3], [3])
    assert (reach_of(ROW, other).most, reach_of(ROW, other).reached) == ([3], [5])
    assert (reach_of(torch.ones(5), ROW).reached, reach_of(torch.zeros(5), ROW).reached) == ([5], [3])


def test_it_resumes():
    reach = reach_of(ROW)
    check_state_is_plain(reach.state_dict())
    resumed = Reach(copy.deepcopy(reach.state_dict()))
    for one in (reach, resumed):
        one.add([ROW.roll(2)], [3])
    assert resumed.reached == reach.reached == [4]
    assert resumed.alike == reach.alike
