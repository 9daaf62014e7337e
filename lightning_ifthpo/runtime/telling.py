"""Warnings of the package, which a report can show again."""

from __future__ import annotations

from weakref import WeakSet

from lightning.pytorch.utilities import rank_zero_warn as _rank_zero_warn

_MOST = 20  # messages; each is told once in a fit
_STACK = 5  # Lightning's own 4, and one for the function here


class Notes:
    """Collects the warnings of the package from `begin` to `end`, each once, in the order in which they came."""

    def __init__(self) -> None:
        self._messages: dict[str, None] = {}

    @property
    def messages(self) -> tuple[str, ...]:
        """The warnings so far, of which the first 20 are kept."""
        return tuple(self._messages)

    def begin(self) -> None:
        """Begins to collect, without what was collected before."""
        self._messages.clear()
        _OPEN.add(self)

    def end(self) -> None:
        """Ends collecting; what was collected remains."""
        _OPEN.discard(self)

    def add(self, message: str) -> None:
        """Keeps a message."""
        if len(self._messages) < _MOST:
            self._messages[message] = None


_OPEN: WeakSet[Notes] = WeakSet()


def rank_zero_warn(message: str) -> None:
    """Warns as Lightning's `rank_zero_warn` does, in the first process, and adds the warning to all open `Notes`."""
    for notes in list(_OPEN):
        notes.add(message)
    _rank_zero_warn(message, stacklevel=_STACK)
