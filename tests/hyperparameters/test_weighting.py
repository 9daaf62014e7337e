"""Sample weights, the network that gives them, and the data set that gives indices."""

import math
from collections import UserDict, namedtuple

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_ifthpo.hyperparameters import IndexedDataset, SampleWeights, WeightNetwork
from tests.helpers.hyperparameters import disturb


def test_sample_weights_start_at_one_and_stay_in_their_range():
    weights = SampleWeights(4)
    assert weights(torch.tensor([3, 0])).tolist() == [1.0, 1.0]
    with torch.no_grad():
        weights.logits.copy_(torch.tensor([-1e3, -1.0, 1.0, 1e3]))
    values = weights(torch.arange(4))
    assert values.tolist() == pytest.approx([0.0, 2 / (1 + math.e), 2 / (1 + 1 / math.e), 2.0])


def test_weights_start_from_margins_in_their_order():
    margins = torch.tensor([-4.0, 0.0, 4.0, 1.0])
    values = SampleWeights.from_margins(margins).natural_values()
    root_mean_square = math.sqrt(33 / 4)
    assert values.tolist() == pytest.approx([2 / (1 + math.exp(-m / root_mean_square)) for m in margins.tolist()])
    assert SampleWeights.from_margins(10 * margins).natural_values().tolist() == pytest.approx(values.tolist())
    assert SampleWeights.from_margins(torch.zeros(2)).natural_values().tolist() == [1.0, 1.0]


def test_margins_may_be_large_half_precision_and_part_of_a_graph():
    margins = torch.tensor([-300.0, 300.0], dtype=torch.float16, requires_grad=True)
    weights = SampleWeights.from_margins(margins)
    assert weights.natural_values().tolist() == pytest.approx([2 / (1 + math.e), 2 / (1 + 1 / math.e)])
    assert weights.logits.is_leaf


def test_a_network_of_weights_starts_at_one_and_stays_in_its_range():
    network, losses, margins = WeightNetwork(2), torch.rand(5), torch.randn(5)
    assert network(losses, margins).tolist() == [1.0] * 5
    values = disturb(network, 1.0)(losses, margins)
    assert bool(((values >= 0.0) & (values <= 2.0)).all())
    assert len(set(values.tolist())) > 1


def test_no_gradient_flows_back_through_the_features_of_a_weight():
    losses = torch.rand(5, requires_grad=True)
    assert not disturb(WeightNetwork())(losses).requires_grad


def test_a_weight_depends_on_each_feature_and_the_hidden_layer_is_as_wide_as_asked():
    network, feature = disturb(WeightNetwork(2, hidden=7)), torch.tensor([0.0, 1.0])
    same = torch.zeros(2)
    for features in ((feature, same), (same, feature)):
        first, second = network(*features).tolist()
        assert first != second
    assert network.net[0].out_features == 7


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
        (lambda: SampleWeights.from_margins(torch.tensor([1.0, torch.nan])), ValueError, "finite margins"),
        (lambda: SampleWeights.from_margins([1.0]), ValueError, r"finite margins in a tensor \[n\], got list"),
        (lambda: WeightNetwork(0), ValueError, "features to be an integer >= 1, got 0"),
        (lambda: WeightNetwork(hidden=0), ValueError, "hidden to be an integer >= 1, got 0"),
        (lambda: WeightNetwork(2)(torch.ones(3)), ValueError, r"2 features \[B\], got shapes"),
        (lambda: WeightNetwork(2)(torch.ones(3), torch.ones(4)), ValueError, r"2 features \[B\], got shapes"),
        (lambda: IndexedDataset(iter([1, 2])), TypeError, "map-style data set"),
    ],
)
def test_refuses(make, error, message):
    with pytest.raises(error, match=message):
        make()
