"""Tensors as one flat vector, and back."""

import pytest
import torch

from lightning_ifthpo.core.space import ParameterSpace


def test_flatten_and_split_are_inverse_for_any_memory_layout():
    tensors = [torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last), torch.randn(()), torch.randn(3, 2).T]
    space = ParameterSpace(tensors)
    flat = space.values
    assert flat.shape == (2 * 3 * 4 * 5 + 1 + 6,)
    assert all(torch.equal(a, b) for a, b in zip(space.split(flat), tensors, strict=True))


def test_none_stands_for_zeros():
    space = ParameterSpace([torch.ones(2), torch.ones(3)])
    assert space.flatten([None, torch.ones(3)]).tolist() == [0, 0, 1, 1, 1]


def test_mixed_dtypes_take_the_widest():
    space = ParameterSpace([torch.zeros(2, dtype=torch.bfloat16), torch.zeros(1, dtype=torch.float64)])
    assert space.dtype == torch.float64
    assert [t.dtype for t in space.split(space.values)] == [torch.bfloat16, torch.float64]


def test_restored_puts_back_every_bit():
    tensor = torch.randn(5)
    before, space = tensor.clone(), ParameterSpace([tensor])
    with space.restored():
        space.assign(space.values + 0.1)
        assert not torch.equal(tensor, before)
    assert torch.equal(tensor, before)


@pytest.mark.parametrize(
    ("tensors", "error", "message"),
    [
        ([], ValueError, "at least one tensor"),
        ([torch.zeros(2, dtype=torch.int64)], TypeError, "real floating-point tensor, got torch.int64"),
        ([torch.zeros(2, dtype=torch.complex64)], TypeError, "got torch.complex64"),
        ([3.0], TypeError, "expected a tensor, got float"),
    ],
    ids=["none", "integer", "complex", "float"],
)
def test_refuses(tensors, error, message):
    with pytest.raises(error, match=message):
        ParameterSpace(tensors)


def test_refuses_a_tensor_twice():
    tensor = torch.zeros(2)
    with pytest.raises(ValueError, match="appears twice"):
        ParameterSpace([tensor, tensor])


def test_refuses_a_vector_of_wrong_shape():
    with pytest.raises(ValueError, match=r"shape \(2,\), got \(3,\)"):
        ParameterSpace([torch.zeros(2)]).split(torch.zeros(3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_zeros_have_the_dtype_of_the_space(dtype):
    assert ParameterSpace([torch.ones(2, dtype=dtype)]).flatten([None]).dtype == dtype
