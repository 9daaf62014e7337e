"""Copies of tensors that take time and memory only once somebody writes to them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

# Bytes from which a copy is made only when somebody writes. A smaller copy takes less than 0.1 ms.
_LARGE = 2**20
_LONG = 2**16  # bytes from which a comparison takes longer than its preparation


def lazy_copy(tensor: Tensor) -> Tensor:
    """Returns a detached copy of a tensor.

    A large one on the CPU shares the tensor's memory until one of the two is written to, by anything that asks torch
    for the memory: an operation, `.data`, NumPy. The one that is written to moves to new memory. Memory that torch did
    not allocate (a mapped file, shared memory, a NumPy array) is copied at once. So is that of an accelerator, where
    the kernels of `torch._foreach_*` write to shared memory (torch 2.11), and a copy takes little time.
    """
    return _shared(tensor) if tensor.device.type == "cpu" else tensor.detach().clone()


def _shared(tensor: Tensor) -> Tensor:
    """Returns a detached copy, which shares memory until one of the two is written to if that is possible."""
    source = tensor.detach()
    if _has_plain_memory(source) and source.device.type in ("cpu", "cuda") and source.nbytes >= _LARGE:
        try:
            # Private: torch has no public name for copy on write.
            return source._lazy_clone()
        except RuntimeError:  # memory of someone else's, or a subclass of Tensor that does not know the operation
            pass
    return source.clone()


class TensorState:
    """Contents, `.grad` and `requires_grad` of a tensor when the object is made, and the way back to them.

    Contents are written back only where they have changed: never into an expanded tensor or a read-only mapped file.

    Args:
        tensor: The tensor.
        keeps_weights: Whether the contents are needed of a tensor that requires a gradient.
        is_gradient: Whether the tensor is the gradient of another one.

    Attributes:
        is_exchanged: Whether evaluations write to a copy in its place.
    """

    def __init__(self, tensor: Tensor, *, keeps_weights: bool = True, is_gradient: bool = False) -> None:
        self.tensor = tensor
        self.is_exchanged = False
        # A frozen backbone, or all gradients, share their memory on an accelerator, too: a copy might not fit.
        self._may_share = isinstance(tensor, nn.Parameter) or is_gradient
        self._memory = tensor.data  # the same memory, which `tensor.data = other` would exchange
        self._entries = _without_repetitions(self._memory)
        self._requires_grad = tensor.requires_grad
        self._copy = self._entries
        if keeps_weights or not tensor.requires_grad:
            self._copy = self._copied()
        self._version = tensor._version
        self._is_lazy = self._copy is not self._entries and _share_memory(self._entries, self._copy)
        self._bits: tuple[Tensor, Tensor] | None = None  # of contents and copy
        self._grad = tensor.grad if tensor.is_leaf else None
        self._grad_state = None if self._grad is None else TensorState(self._grad, is_gradient=True)

    def _copied(self) -> Tensor:
        if self.tensor.requires_grad:
            # Weights stay where they are: others may know the place in memory, such as captured CUDA graphs.
            return self._entries.clone()
        return (_shared if self._may_share else lazy_copy)(self._entries)

    def restore(self) -> None:
        """Returns to the state; neither a graph nor the version counter sees it."""
        if not self._is_unchanged():
            self._entries.copy_(self._copy)
        self.tensor.data = self._memory
        if self.tensor.is_leaf:
            self.tensor.requires_grad_(self._requires_grad)
            self.tensor.grad = self._grad
        if self._grad_state is not None:
            self._grad_state.restore()

    def rewind(self) -> None:
        """Restores contents and `.grad` between two evaluations; weights that somebody moves stay as they are.

        A graph that has kept changed contents raises an error, unless they were written behind the version counter on
        an accelerator, where comparing contents would wait for the device.

        Raises:
            RuntimeError: If a kernel wrote to the memory that a tensor shares with its copy.
        """
        if self._is_shared() and self.tensor._version != self._version:
            raise RuntimeError(
                f"a loss changes a frozen weight or a gradient of shape {tuple(self.tensor.shape)} on "
                f"{self.tensor.device} by a function of torch._foreach, as torch.optim.swa_utils.AveragedModel does, "
                "and the change cannot be undone there. Change such tensors one by one, with Tensor.lerp_ or "
                "Tensor.copy_, or outside the loss"
            )
        if not self.tensor.requires_grad and self._was_touched():
            self.tensor.data = self._memory
            if not self._is_unchanged():
                with torch.no_grad():
                    _without_repetitions(self.tensor).copy_(self._copy)
            self._version = self.tensor._version
        elif not (self.tensor.requires_grad or self._is_lazy or self.is_exchanged or self._is_unchanged()):
            self._entries.copy_(self._copy)  # such as an average of weights, which is often written to by `.data`
        if self._grad is not None or (self.tensor.is_leaf and self.tensor.grad is not None):
            self.tensor.grad = self._grad
            if self._grad_state is not None:
                self._grad_state.rewind()

    def _was_touched(self) -> bool:
        if self._is_lazy:
            return not self._is_shared()
        if self._entries.device.type == "cpu":
            return True
        # `data_ptr` of a tensor without memory of its own, such as a sparse one, raises
        moved = _has_plain_memory(self._memory) and self.tensor.data_ptr() != self._memory.data_ptr()
        return moved or self.tensor._version != self._version

    def _is_shared(self) -> bool:
        """Returns whether the contents share their memory with the copy, because nobody has written to them."""
        return self._is_lazy and _share_memory(self._entries, self._copy)

    def _is_unchanged(self) -> bool:
        if self._copy is self._entries or self._is_shared():
            return True
        # On an accelerator a comparison waits for the device; memory that must not be written to is on the CPU.
        if self._entries.device.type != "cpu" or not _has_plain_memory(self._entries):
            return False
        if self._bits is None:
            self._bits = _bits(self._entries, self._copy)
        return torch.equal(*self._bits)


def has_state(tensor: Tensor) -> bool:
    """Returns whether a tensor has memory that may change: not on meta devices, in inference mode or inside `vmap`."""
    if is_lazy(tensor) or tensor.is_meta or tensor.is_inference() or tensor.is_nested:
        return False
    # Private: the public torch.func.debug_unwrap is newer than torch 2.6.
    return not torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def _share_memory(tensor: Tensor, copy: Tensor) -> bool:
    """Returns whether a lazy copy, which takes memory of its own at the first write, has taken none."""
    # Private: asking for `data_ptr`, the public name, counts as a write.
    address = torch._C._data_address  # type: ignore[attr-defined]
    return _has_plain_memory(tensor) and address(tensor) == address(copy)


def _has_plain_memory(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_quantized


def _bits(tensor: Tensor, copy: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the bits of a tensor and of its copy as integers: NaN equals NaN, and −0 is not 0.

    Those of the tensor are a view, which follows its contents; the copy does not change. A conjugate or negative view
    has its sign as a flag, which the copy has not.
    """
    if tensor.is_conj():
        tensor, copy = tensor.conj(), copy.conj().resolve_conj()
    if tensor.is_neg():
        tensor, copy = torch._neg_view(tensor), copy.neg()
    pair = [torch.view_as_real(one) if one.is_complex() else one for one in (tensor, copy)]
    if tensor.nbytes >= _LONG and all(one.is_contiguous() and one.nbytes % 8 == 0 for one in pair):
        pair = [one.view(-1) for one in pair]
        if all(one.storage_offset() * one.itemsize % 8 == 0 for one in pair):
            return pair[0].view(torch.int64), pair[1].view(torch.int64)  # eight bytes at once take half the time
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[pair[0].itemsize]
    return pair[0].view(integers), pair[1].view(integers)


def _without_repetitions(tensor: Tensor) -> Tensor:
    """Returns a tensor without the repetitions that `expand` makes, which are all the same place in memory."""
    if _has_plain_memory(tensor):
        for dimension, stride in enumerate(tensor.stride()):
            if stride == 0 and tensor.shape[dimension] > 1:
                tensor = tensor.narrow(dimension, 0, 1)
    return tensor
