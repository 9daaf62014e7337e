"""Stand-ins for loggers that write nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import PurePath
from typing import Any

from lightning.pytorch.loggers.logger import DummyLogger

_DATA = (str, bytes, int, float, complex, PurePath, type(None))


def silenced(logger: Any) -> Any:
    """Returns a logger of the same class, name, version and directories, in which all methods do nothing."""
    if type(logger) is DummyLogger:
        return logger
    kind = type(logger)
    _ = logger.name, logger.version  # a logger may choose its version when it is first asked, by what is on the disk
    methods = [name for name in dir(kind) if not name.startswith("_") and callable(getattr(kind, name))]
    members: dict[str, Any] = dict.fromkeys(methods, do_nothing)
    members["experiment"] = property(lambda _: _Silent(lambda: logger.experiment))
    stand_in: Any = object.__new__(type(kind.__name__, (kind,), members))
    vars(stand_in).update(vars(logger))
    return stand_in


class _Silent:
    """An object with the data of another one, in which all methods and assignments do nothing."""

    def __init__(self, original: Callable[[], Any]) -> None:
        vars(self)["_original"] = original

    def __getattr__(self, name: str) -> Any:
        return _stand_in(getattr(self._original(), name))

    def __setattr__(self, name: str, value: Any) -> None:
        pass

    def __getitem__(self, key: Any) -> Any:
        return _stand_in(self._original()[key])

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def __iter__(self) -> Iterator[Any]:
        return map(_stand_in, list(self._original()))

    def __len__(self) -> int:
        return len(self._original())

    def __contains__(self, key: Any) -> bool:
        return key in self._original()

    def __bool__(self) -> bool:
        return bool(self._original())


def _stand_in(value: Any) -> Any:
    if isinstance(value, _DATA):
        return value
    return do_nothing if callable(value) else _Silent(lambda: value)


def do_nothing(*_: Any, **__: Any) -> None:
    """Takes the place of a method that writes."""
