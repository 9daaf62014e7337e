"""Hearing of each product with a curvature, while something else computes with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

_listener: ContextVar[Callable[[], None] | None] = ContextVar("_listener", default=None)


@contextmanager
def hearing_products(listener: Callable[[], None]) -> Iterator[None]:
    """Calls the listener after each product inside the block, as solvers and spectrum code count them.

    >>> import torch
    >>> from lightning_ifthpo.curvature import MatrixOperator
    >>> heard = []
    >>> with hearing_products(lambda: heard.append("a product")):
    ...     _ = MatrixOperator(torch.eye(2)).damped(1.0).matvec(torch.ones(2))
    >>> heard
    ['a product']
    """
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def as_one_product(product: Callable[[Tensor], Tensor], v: Tensor) -> Tensor:
    """Returns the product with v: [n], and tells the listener of one, whatever products of other operators it takes."""
    listener = _listener.get()
    if listener is None:
        return product(v)
    token = _listener.set(None)
    try:
        image = product(v)
    finally:
        _listener.reset(token)
    listener()
    return image
