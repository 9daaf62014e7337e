"""Fixed examples, whole and split among processes that are played."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler

from lightning_ifthpo.curvature import MatrixOperator
from lightning_ifthpo.runtime.fixed_batches import FixedBatches
from tests.helpers.trainers import classification_data

CPU = torch.device("cpu")


def ranks(rank=0, count=1):
    """One of several processes, which keeps its own mean and weight."""
    return SimpleNamespace(rank=rank, count=count, weighted_mean=lambda operator, weight: (operator, weight))


def measured(examples):
    """The batches that are used, the mean of their sizes weighted by example, and the weight of this process."""
    used = []

    def operator(batch):
        inputs = batch if isinstance(batch, torch.Tensor) else batch[0]
        used.append(inputs)
        return MatrixOperator(len(inputs) * torch.eye(1))

    mean, weight = examples.mean(operator)
    value = mean.matvec(torch.ones(1)).item()
    return used, value, weight


def test_batches_of_any_size_count_by_their_examples():
    examples = FixedBatches(DataLoader(classification_data(10), batch_size=4), CPU, ranks())
    _, value, weight = measured(examples)
    assert value == pytest.approx((4 * 4 + 4 * 4 + 2 * 2) / 10)
    assert weight == 10


def test_processes_get_different_batches_which_together_are_all():
    batches = [torch.full((size, 1), float(size)) for size in (1, 2, 3)]
    parts = [measured(FixedBatches(batches, CPU, ranks(rank, 2))) for rank in range(2)]
    assert [{len(batch) for batch in used} for used, _, _ in parts] == [{1, 3}, {2}]
    assert [weight for _, _, weight in parts] == [4, 2]


def test_a_process_without_examples_takes_part_with_weight_zero():
    used, _, weight = measured(FixedBatches([torch.ones(3, 1)], CPU, ranks(1, 2)))
    assert (len(used[0]), weight) == (3, 0)


def test_what_a_distributed_sampler_has_split_is_not_split_again():
    data = classification_data(8)
    sampler = DistributedSampler(data, num_replicas=2, rank=0, shuffle=False)
    _, _, weight = measured(FixedBatches(DataLoader(data, batch_size=2, sampler=sampler), CPU, ranks(0, 2)))
    assert weight == 4


def test_random_transforms_repeat_and_disturb_nobody():
    class Noisy(torch.utils.data.Dataset):
        def __len__(self):
            return 3

        def __getitem__(self, index):
            return torch.rand(1)

    state = torch.get_rng_state()
    first, again = (measured(FixedBatches(DataLoader(Noisy(), batch_size=3), CPU, ranks()))[0][0] for _ in range(2))
    assert torch.equal(first, again)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ([], ValueError, "is empty or has an empty batch"),
        ([torch.ones(0, 2)], ValueError, "is empty or has an empty batch"),
        ([object()], ValueError, "cannot tell the number of examples in a batch of type object"),
        (classification_data(4), TypeError, "wrap it in a DataLoader"),
    ],
    ids=["no batch", "an empty batch", "of unknown size", "a data set"],
)
def test_bad_sources_are_refused(source, error, message):
    with pytest.raises(error, match=message):
        FixedBatches(source, CPU, ranks())
