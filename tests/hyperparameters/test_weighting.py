"""Sample weights, and the data set that gives indices."""

import math

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_ifthpo.hyperparameters import IndexedDataset, SampleWeights


def test_sample_weights_start_at_one_and_stay_in_their_range():
    weights = SampleWeights(4)
    assert weights(torch.tensor([3, 0])).tolist() == [1.0, 1.0]
    with torch.no_grad():
        weights.logits.copy_(torch.tensor([-1e3, -1.0, 1.0, 1e3]))
    values = weights(torch.arange(4))
    assert values.tolist() == pytest.approx([0.0, 2 / (1 + math.e), 2 / (1 + 1 / math.e), 2.0])


def test_indexed_dataset_gives_each_example_its_index():
    data = IndexedDataset(TensorDataset(torch.arange(5), torch.arange(5) * 10))
    assert len(data) == 5
    x, y, index = next(iter(DataLoader(data, batch_size=3)))
    assert (x.tolist(), y.tolist(), index.tolist()) == ([0, 1, 2], [0, 10, 20], [0, 1, 2])
    assert IndexedDataset([7, 8])[1] == (8, 1)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: SampleWeights(0), ValueError, "n to be an integer >= 1, got 0"),
        (lambda: IndexedDataset(iter([1, 2])), TypeError, "map-style data set"),
    ],
)
def test_refuses(make, error, message):
    with pytest.raises(error, match=message):
        make()
