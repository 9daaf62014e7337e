"""Iterators that can be read ahead of their owner."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any


class Rewindable(Iterator[Any]):
    """An iterator that first yields what others have read ahead of it. Other attributes are those of its source.

    >>> numbers = Rewindable(iter([1, 2, 3]))
    >>> list(numbers.ahead()), next(numbers)
    ([1, 2, 3], 1)
    """

    def __init__(self, source: Iterator[Any]) -> None:
        self.source = source
        self.read_ahead: deque[Any] = deque()

    def __next__(self) -> Any:
        return self.read_ahead.popleft() if self.read_ahead else next(self.source)

    def __getattr__(self, name: str) -> Any:
        if name == "source":  # while a copy is being made
            raise AttributeError(name)
        return getattr(self.source, name)

    def ahead(self) -> Iterator[Any]:
        """Yields what this iterator will yield next, without advancing it."""
        position = 0
        while True:
            if position == len(self.read_ahead):
                try:
                    self.read_ahead.append(next(self.source))
                except StopIteration:
                    return
            yield self.read_ahead[position]
            position += 1
