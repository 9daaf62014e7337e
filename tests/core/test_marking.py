"""Marking the outputs of a model inside a loss."""

import pytest
import torch

from lightning_ifthpo.core.marking import mark_outputs, recording_outputs


def test_the_output_is_returned_unchanged():
    output = torch.ones(2)
    assert mark_outputs(output) is output


def test_outputs_are_recorded_inside_the_block_only_and_in_order():
    first, second = torch.ones(1), torch.zeros(1)
    mark_outputs(first)
    with recording_outputs() as outputs:
        mark_outputs(second)
        mark_outputs(first)
    mark_outputs(second)
    assert [id(output) for output in outputs] == [id(second), id(first)]


def test_blocks_may_be_nested():
    with recording_outputs() as outer:
        mark_outputs(torch.ones(1))
        with recording_outputs() as inner:
            mark_outputs(torch.ones(1))
        mark_outputs(torch.ones(1))
    assert (len(outer), len(inner)) == (2, 1)


def test_an_error_ends_the_recording():
    with pytest.raises(ArithmeticError), recording_outputs() as outputs:
        raise ArithmeticError
    mark_outputs(torch.ones(1))
    assert outputs == []


@pytest.mark.parametrize("output", [(torch.ones(1), torch.ones(1)), {"a": torch.ones(1)}, None], ids=repr)
def test_several_outputs_are_marked_one_by_one(output):
    with pytest.raises(TypeError, match=f"expected a tensor, got {type(output).__name__}; of several outputs"):
        mark_outputs(output)


def test_a_loss_is_not_the_output_of_a_model():
    with pytest.raises(ValueError, match=r"such as logits \[B, C\], got a scalar, as a loss is; mark the tensor from"):
        mark_outputs(torch.ones(3).sum())
