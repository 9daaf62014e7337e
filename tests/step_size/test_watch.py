"""The watch on the lengths of gradients."""

import pytest
import torch

from lightning_ifthpo.step_size.watch import GradientWatch
from tests.helpers.device import DEVICE


def gradients(length):
    """Two gradients that have a length together."""
    return [torch.tensor([0.6 * length], device=DEVICE), torch.tensor([[0.0, -0.8 * length]], device=DEVICE)]


def alarms(lengths):
    """Returns after which gradients the watch is alarmed."""
    watch, found = GradientWatch(), []
    for number, length in enumerate(lengths):
        watch.observe(gradients(length))
        if watch.is_alarmed:
            found.append(number)
    return found


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ([1, 1.1, 1.2, 1.3, 1.4], [3, 4]),  # the third record in a row, and those after it
        ([1, 5, 25], []),  # two
        ([1, 5, 25, 20, 30, 40, 45], [6]),  # they have to be in a row
        ([9, 1, 2, 4, 8, 16, 32, 64], [7]),  # 2, 4 and 8 are no records
        ([9] + 32 * [1] + [2, 4, 8], [35]),  # the last 32 count
        ([9] + 31 * [1] + [2, 4, 8], []),
        ([1, 2, 4, 8, 8, 16], [3]),  # the alarm ends where the gradient does not grow
        ([0, 0, 0, 1e-15, 1e-10, 1e-5], [5]),  # from zero on
        ([1, 2, 4, float("inf")], [3]),
        ([1, 2, float("nan"), 8, 16], []),
        ([1, float("inf"), 2, 4, 8], [3, 4]),  # a step that a loss scaler skips is no length to compare with
    ],
)
def test_an_alarm_needs_records_in_a_row(lengths, expected):
    assert alarms(lengths) == expected


def test_noise_raises_few_alarms():
    """One in 39,000 steps is expected."""
    lengths = torch.rand(20_000, generator=torch.Generator().manual_seed(0)).tolist()
    assert len(alarms(lengths)) <= 2


def test_sparse_gradients_count_with_all_their_entries():
    watch, same = GradientWatch(), GradientWatch()
    for length in (1.0, 2.0, 3.0, 4.0):
        index = torch.tensor([[1, 1]], device=DEVICE)  # the same row twice
        values = torch.full((2, 1), length / 2, device=DEVICE)
        watch.observe([torch.sparse_coo_tensor(index, values, (3, 1), check_invariants=True)])
        same.observe([torch.tensor([length], device=DEVICE)])
    assert watch.is_alarmed
    assert watch.state_dict() == same.state_dict()


def test_a_watch_goes_on_from_its_state():
    whole, first, second = GradientWatch(), GradientWatch(), GradientWatch()
    for length in (1.0, 2.0, 4.0):
        whole.observe(gradients(length))
    for length in (1.0, 2.0):
        first.observe(gradients(length))
    second.load_state_dict(first.state_dict())
    second.observe(gradients(4.0))
    assert second.state_dict() == whole.state_dict()
    second.observe(gradients(8.0))
    assert second.is_alarmed
