"""Sample weights, and the data set that gives indices."""

import math
from collections import UserDict, namedtuple

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


class Encoding(UserDict):
    """A mapping that is no dict, as tokenizers return it."""


def padded(examples):
    """Collates as text libraries do: only mappings, padded to the longest."""
    width = max(len(example["ids"]) for example in examples)
    ids = [example["ids"] + [0] * (width - len(example["ids"])) for example in examples]
    others = {key: torch.tensor([example[key] for example in examples]) for key in examples[0] if key != "ids"}
    return {"ids": torch.tensor(ids), **others}


@pytest.mark.parametrize("kind", [dict, Encoding])
def test_mappings_get_a_key(kind):
    examples = [kind({"ids": [1, 2], "label": 5}), kind({"ids": [3], "label": 6})]
    data = IndexedDataset(examples)
    batch = next(iter(DataLoader(data, batch_size=2, collate_fn=padded)))
    assert {key: value.tolist() for key, value in batch.items()} == {
        "ids": [[1, 2], [3, 0]],
        "label": [5, 6],
        "index": [0, 1],
    }
    assert "index" not in examples[0]  # the data set itself is left alone
    assert next(iter(DataLoader(IndexedDataset([{"x": 1.0}]))))["index"].tolist() == [0]


def test_a_key_that_is_taken_is_refused():
    with pytest.raises(ValueError, match="have a key 'index' already"):
        IndexedDataset([{"index": 3}])[0]


def test_named_tuples_become_tuples():
    example = namedtuple("Example", "x y")(1, 2)
    assert IndexedDataset([example])[0] == (1, 2, 0)


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
