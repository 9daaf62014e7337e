"""Checks of arguments that many constructors share."""

from __future__ import annotations

from collections.abc import Sequence


def require_at_least(name: str, value: int, minimum: int) -> None:
    """Raises ValueError unless the value is an integer that is large enough."""
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise ValueError(f"expected {name} to be an integer >= {minimum}, got {value!r}")


def require_choice(name: str, value: object, choices: Sequence[object]) -> None:
    """Raises ValueError unless the value is one of the choices."""
    if value not in choices:
        raise ValueError(f"expected {name} to be one of {tuple(choices)}, got {value!r}")


def require_tolerance(rtol: float | None) -> None:
    """Raises ValueError unless the tolerance is None or lies in [0, 1)."""
    if rtol is not None and not 0.0 <= rtol < 1.0:
        raise ValueError(f"expected 0 <= rtol < 1 or None, got {rtol!r}")
