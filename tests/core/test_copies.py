"""Copies that are made when somebody writes."""

import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_ifthpo.core.copies import TensorState, has_state, lazy_copy
from tests.helpers.device import DEVICE

LARGE = 2**19  # entries in float32: more than what is copied at once

WRITES = {
    "operation": lambda tensor: tensor.add_(1.0),
    "data": lambda tensor: tensor.data.mul_(3.0),
    "view": lambda tensor: tensor[:1].zero_(),
    "index": lambda tensor: tensor.__setitem__(0, 7.0),
    "foreach": lambda tensor: torch._foreach_add_([tensor], 1.0),
    "BatchNorm": lambda tensor: F.batch_norm(
        torch.ones(2, len(tensor), device=DEVICE), tensor, torch.ones(len(tensor), device=DEVICE), training=True
    ),
}
if DEVICE.type == "cpu":
    WRITES["NumPy"] = lambda tensor: tensor.numpy().__setitem__(0, 7.0)


def large():
    return torch.arange(1.0, LARGE + 1.0, device=DEVICE)


@pytest.mark.parametrize("size", [3, LARGE])
@pytest.mark.parametrize("name", WRITES)
def test_a_copy_does_not_see_what_is_written_to_the_original(name, size):
    tensor, wanted = large()[:size].clone(), large()[:size]
    copy = lazy_copy(tensor)
    WRITES[name](tensor)
    assert torch.equal(copy, wanted)
    assert not torch.equal(tensor, wanted)


def test_an_original_does_not_see_what_is_written_to_the_copy():
    tensor = large()
    lazy_copy(tensor).zero_()
    assert torch.equal(tensor, large())


@pytest.mark.parametrize("size", [3, LARGE])
@pytest.mark.parametrize("kind", [torch.clone, lambda tensor: nn.Parameter(tensor, requires_grad=False)])
@pytest.mark.parametrize("name", WRITES)
def test_what_a_loss_changes_is_undone_between_evaluations_or_refused(name, kind, size):
    """On CUDA, foreach kernels write to memory that is shared until something is written to it."""
    tensor = kind(large()[:size].clone())
    state = TensorState(tensor)
    WRITES[name](tensor)
    refused = DEVICE.type == "cuda" and name == "foreach" and isinstance(tensor, nn.Parameter) and size == LARGE
    with pytest.raises(RuntimeError, match=r"torch\._foreach") if refused else nullcontext():
        state.rewind()
    if not refused:
        assert torch.equal(tensor, large()[:size])


def test_a_large_copy_takes_no_memory_until_something_is_written():
    tensor = torch.arange(1.0, LARGE + 1.0)
    copy = lazy_copy(tensor)
    assert torch._C._is_cow_tensor(copy)
    assert float(tensor.sum() - copy.sum()) == 0.0  # reading shares
    assert torch._C._is_cow_tensor(copy)


@pytest.mark.parametrize("size", [3, LARGE])
@pytest.mark.parametrize("name", WRITES)
def test_contents_are_restored_bit_for_bit(name, size):
    tensor, wanted = large()[:size].clone(), large()[:size]
    state = TensorState(tensor)
    WRITES[name](tensor)
    state.restore()
    assert torch.equal(tensor, wanted)
    WRITES[name](tensor)  # again
    state.restore()
    assert torch.equal(tensor, wanted)


@pytest.mark.parametrize("value", [math.nan, -0.0, math.inf])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64, torch.complex64, torch.complex128])
@pytest.mark.parametrize("shape", [(2, 3), (200, 200)])  # compared entry by entry, and eight bytes at once
@pytest.mark.parametrize("transposed", [False, True])
def test_special_numbers_are_restored_bit_for_bit(value, dtype, shape, transposed):
    tensor = torch.full(shape, value, dtype=dtype, device=DEVICE)
    tensor = tensor.t() if transposed else tensor
    state, before = TensorState(tensor), tensor.clone()
    tensor.zero_()
    state.restore()
    numbers = [torch.view_as_real(t) if t.is_complex() else t for t in (tensor, before)]
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[numbers[0].itemsize]
    assert torch.equal(*(t.view(integers) for t in numbers))


VIEWS = {
    "conjugate": lambda numbers: numbers.conj(),
    "negative": lambda numbers: numbers.conj().imag,
    "negative, expanded": lambda numbers: numbers.conj().imag.expand(3, 2),
}


@pytest.mark.parametrize("name", VIEWS)
def test_views_with_a_changed_sign_are_restored(name):
    """The sign is a flag of the tensor, and not in its memory."""
    numbers = torch.tensor([1 + 2j, -3 + 0j], device=DEVICE)
    view, memory = VIEWS[name](numbers), numbers.clone()
    state = TensorState(view)
    numbers.imag.zero_()
    state.restore()
    assert torch.equal(numbers, memory)
    version = view._version
    state.rewind()
    assert torch.equal(numbers, memory)
    if DEVICE.type == "cpu":
        assert view._version == version  # what has not changed is not written to


def test_a_later_copy_of_changed_contents_does_not_hide_the_change():
    tensor = large()
    state = TensorState(tensor)
    tensor.add_(1.0)
    later = TensorState(tensor)  # such as that of a block inside another one
    state.restore()
    assert torch.equal(tensor, large())
    tensor.sub_(5.0)
    later.rewind()
    assert torch.equal(tensor, large() + 1.0)
    state.rewind()
    assert torch.equal(tensor, large())


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int16, torch.int64])
def test_integers_are_restored(dtype):
    tensor = torch.ones(3, device=DEVICE).to(dtype)
    state = TensorState(tensor)
    tensor.zero_()
    state.restore()
    assert tensor.tolist() == [1, 1, 1]


READ_ONLY = {
    "expanded": lambda: torch.ones(1, 3, device=DEVICE).expand(4, 3),
    "expanded scalar": lambda: torch.tensor(0.1, device=DEVICE).expand(3),
    "large expanded": lambda: large().expand(2, LARGE),
    "empty": lambda: torch.empty(0, device=DEVICE),
}


@pytest.mark.parametrize("name", READ_ONLY)
def test_what_cannot_be_written_to_is_left_alone(name):
    tensor = READ_ONLY[name]()
    state, before = TensorState(tensor), tensor.clone()
    state.restore()
    state.rewind()
    assert torch.equal(tensor, before)


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
def test_a_read_only_mapped_file_is_not_written_to(tmp_path):
    np.save(tmp_path / "array.npy", np.array([1.0, math.nan, 3.0]))
    mapped = torch.from_numpy(np.load(tmp_path / "array.npy", mmap_mode="r"))
    state = TensorState(mapped)
    state.restore()  # writing would end the process
    state.rewind()
    assert mapped[0] == 1.0


def test_memory_of_a_numpy_array_is_restored_in_place():
    array = np.ones(LARGE, dtype=np.float32)
    tensor = torch.from_numpy(array)
    state = TensorState(tensor)
    array[0] = 5.0
    state.restore()
    assert array[0] == 1.0


def test_gradients_and_flags_are_restored():
    weight = torch.ones(2, device=DEVICE, requires_grad=True)
    weight.grad = gradient = torch.ones(2, device=DEVICE)
    fresh = torch.ones(2, device=DEVICE)
    states = [TensorState(weight), TensorState(fresh)]
    (weight * fresh.requires_grad_()).sum().backward()
    assert weight.grad.tolist() == [2.0, 2.0]
    weight.grad = weight.grad.clone()
    weight.requires_grad_(False)
    for state in states:
        state.restore()
    assert weight.grad is gradient
    assert gradient.tolist() == [1.0, 1.0]
    assert weight.requires_grad
    assert (fresh.grad, fresh.requires_grad) == (None, False)


def test_data_that_was_exchanged_is_the_old_one_again():
    weight = torch.ones(2, device=DEVICE)
    memory, state = weight.data_ptr(), TensorState(weight)
    weight.data = torch.zeros(2, device=DEVICE)
    state.restore()
    assert weight.tolist() == [1.0, 1.0]
    assert weight.data_ptr() == memory


def test_weights_stay_where_they_are_in_memory():
    weight = large().requires_grad_()
    memory, state = weight.data_ptr(), TensorState(weight)
    weight.data.add_(1.0)
    state.restore()
    assert weight.data_ptr() == memory


def test_a_graph_that_has_kept_changed_values_raises_an_error():
    factor, x = torch.ones(2, device=DEVICE), torch.ones(2, device=DEVICE, requires_grad=True)
    state = TensorState(factor)
    factor.add_(1.0)
    loss = (x * factor).sum()
    state.rewind()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_tensors_without_memory_of_their_own_have_no_state():
    with torch.inference_mode():
        inference = torch.ones(1)
    wrapped = []
    torch.func.vmap(lambda x: (wrapped.append(has_state(x)), x)[1])(torch.ones(2))
    assert wrapped == [False]
    assert not has_state(inference)
    assert not has_state(torch.ones(1, device="meta"))
    assert not has_state(torch.nn.LazyLinear(2).weight)
    assert has_state(torch.ones(1))


def test_a_sparse_gradient_is_restored():
    table = torch.nn.Embedding(5, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    gradient, before = table.weight.grad, table.weight.grad.to_dense().clone()
    state = TensorState(table.weight)
    table(torch.tensor([1, 3])).sum().backward()
    state.restore()
    assert table.weight.grad is gradient
    assert torch.equal(gradient.to_dense(), before)
