"""The stream of outer batches."""

import itertools

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, SequentialSampler, TensorDataset

from lightning_ifthpo import IFTHypergradient
from lightning_ifthpo.runtime.outer_data import EndlessBatchSampler, OuterData
from tests.helpers.trainers import Classifier, same, trained


def test_random_state_of_outer_transforms_is_kept_apart():
    """Outer data that draw random numbers while they are fetched do not change what training draws."""

    class Noisy(Dataset):
        def __len__(self):
            return 8

        def __getitem__(self, index):
            return torch.rand(4), torch.tensor(0)

    def states(callbacks):
        return [batch[3] for batch in trained(callbacks, lambda: Classifier(hyper_lr=0.0))[2].batches]

    outer = DataLoader(Noisy(), batch_size=4, shuffle=True)
    assert same(states([IFTHypergradient(1, outer_dataloader=outer)]), states([]))


def test_worker_processes_of_the_outer_data_end_with_the_fit():
    import multiprocessing

    outer = DataLoader(TensorDataset(torch.randn(8, 4), torch.zeros(8, dtype=torch.long)), batch_size=4, num_workers=1)
    trained([IFTHypergradient(4, outer_dataloader=outer)])
    assert not multiprocessing.active_children()


CPU = torch.device("cpu")


def take(sampler, count):
    return list(itertools.islice(iter(sampler), count))


def test_epochs_are_whole_shuffled_and_joined():
    indices = list(itertools.chain(*take(EndlessBatchSampler(10, 4, seed=1), 5)))
    first, second = indices[:10], indices[10:]
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    assert first != list(range(10))


def test_every_batch_is_full_even_if_the_data_are_few():
    assert {len(batch) for batch in take(EndlessBatchSampler(10, 4, seed=0), 20)} == {4}
    assert {len(batch) for batch in take(EndlessBatchSampler(3, 100, seed=0), 5)} == {3}


def test_a_batch_is_a_function_of_seed_number_and_rank():
    whole = take(EndlessBatchSampler(10, 3, seed=5), 12)
    assert take(EndlessBatchSampler(10, 3, seed=5, first=7), 5) == whole[7:]
    assert take(EndlessBatchSampler(10, 3, seed=6), 12) != whole


def test_ranks_split_one_stream():
    one = take(EndlessBatchSampler(12, 6, seed=2), 4)
    two = [take(EndlessBatchSampler(12, 3, seed=2, rank=rank, world_size=2), 4) for rank in (0, 1)]
    assert [a + b for a, b in zip(*two, strict=True)] == one


def dataset(n=10):
    return TensorDataset(torch.arange(n))


@pytest.mark.parametrize("workers", [0, 1])
def test_resuming_goes_on_where_it_stopped(workers):
    def stream(consumed):
        loader = DataLoader(dataset(), batch_size=4, num_workers=workers)
        return OuterData(loader, CPU, seed=3, consumed=consumed)

    whole = stream(0)
    batches = [whole.next()[0].tolist() for _ in range(6)]
    later = stream(4)
    assert [later.next()[0].tolist() for _ in range(2)] == batches[4:]
    assert (whole.consumed, later.consumed) == (6, 6)


def test_peek_uses_nothing_up():
    stream = OuterData(DataLoader(dataset(), batch_size=4), CPU, seed=0)
    assert torch.equal(stream.peek()[0], stream.peek()[0])
    assert torch.equal(stream.peek()[0], stream.next()[0])
    assert stream.consumed == 1


class RandomTransform(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return torch.rand(2) + float(np.random.rand())  # noqa: NPY002 - as users do


def test_random_transforms_are_repeatable_and_disturb_nobody():
    def stream(consumed=0):
        return OuterData(DataLoader(RandomTransform(), batch_size=2, shuffle=True), CPU, seed=1, consumed=consumed)

    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    first = stream()
    batches = [first.next() for _ in range(3)]
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002
    assert not torch.equal(batches[0], batches[1])
    assert torch.equal(stream(2).next(), batches[2])


class Stream(IterableDataset):
    def __iter__(self):
        yield from range(4)


def weighted():
    return DataLoader(dataset(4), batch_size=2, sampler=RandomSampler(dataset(4), replacement=True, num_samples=4))


@pytest.mark.parametrize(
    "source",
    [
        lambda: DataLoader(Stream(), batch_size=2),
        lambda: [torch.tensor([0, 1]), torch.tensor([2, 3])],
        lambda: DataLoader(dataset(4), batch_sampler=[[0, 1], [2, 3]]),
    ],
    ids=["iterable", "list", "batch sampler"],
)
def test_anything_else_is_cycled_in_its_own_order(source):
    stream = OuterData(source(), CPU, seed=0)
    batches = [
        torch.as_tensor(batch[0] if isinstance(batch, list) else batch).tolist()
        for batch in (stream.next() for _ in range(3))
    ]
    assert batches == [[0, 1], [2, 3], [0, 1]]
    with pytest.warns(UserWarning, match="to resume, the first 3 outer batches are skipped"):
        later = OuterData(source(), CPU, seed=0, consumed=3)
    batch = later.next()
    assert torch.as_tensor(batch[0] if isinstance(batch, list) else batch).tolist() == [2, 3]


def test_a_sampler_with_replacement_is_kept():
    assert OuterData(weighted(), CPU, seed=0).next()[0].shape == (2,)


def test_a_sampler_of_a_part_is_kept():
    loader = DataLoader(dataset(10), batch_size=2, sampler=SequentialSampler(range(4)))
    stream = OuterData(loader, CPU, seed=0)
    assert [stream.next()[0].tolist() for _ in range(3)] == [[0, 1], [2, 3], [0, 1]]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (lambda: dataset(4), "got TensorDataset; wrap it in a DataLoader"),
        (lambda: iter([1, 2]), "got list_iterator"),
        (lambda: [DataLoader(dataset(4))], "got list of loaders"),
        (lambda: 3, "got int"),
    ],
    ids=["data set", "iterator", "loaders", "number"],
)
def test_what_yields_no_batches_again_and_again_is_refused(source, message):
    with pytest.raises(TypeError, match=f"expected one DataLoader.*{message}"):
        OuterData(source(), CPU, seed=0)


def test_several_ranks_are_told_that_the_data_are_not_split():
    with pytest.warns(UserWarning, match="every rank iterates over the whole outer loader"):
        OuterData([1, 2], CPU, seed=0, world_size=2)


@pytest.mark.parametrize(
    "source",
    [
        lambda: DataLoader(dataset(3), batch_size=4, drop_last=True),
        lambda: DataLoader(TensorDataset(torch.zeros(0, 2)), batch_size=4),
        list,
    ],
    ids=["drop_last", "no examples", "empty list"],
)
def test_empty_data_are_an_error(source):
    with pytest.raises(ValueError, match="outer data loader is empty"):
        OuterData(source(), CPU, seed=0)


def test_an_iterable_that_turns_out_empty_is_an_error():
    class Empty(IterableDataset):
        def __iter__(self):
            return iter(())

    stream = OuterData(DataLoader(Empty(), batch_size=2), CPU, seed=0)
    with pytest.raises(ValueError, match="yielded no batch"):
        stream.next()
