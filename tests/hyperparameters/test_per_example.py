"""Hyperparameters with a row for each training example."""

import pytest
import torch

from lightning_ifthpo.hyperparameters import SampleWeights, SoftLabels


@pytest.mark.parametrize("make", [lambda: SampleWeights(4), lambda: SoftLabels(torch.tensor([0, 1, 2, 0]), 3)])
def test_an_index_that_is_too_large_is_refused_in_words(make):
    module = make()
    kind = type(module).__name__
    assert module.examples == 4
    assert len(module(torch.tensor([3, 0]))) == 2
    with pytest.raises(IndexError, match=rf"{kind} has rows for 4 training examples, .* up to 7\. Wrap .* after"):
        module(torch.tensor([0, 7, 3]))
