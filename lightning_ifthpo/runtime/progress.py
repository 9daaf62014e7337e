"""What takes long, in the Trainer's progress bar."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeAlias

from lightning_ifthpo.curvature.counting import hearing_products

Clock: TypeAlias = Callable[[], float]
"""Returns seconds."""

_LONG = 1.0  # seconds; shorter work is over before anybody has read what it is
_READABLE = 0.1  # seconds that a number stays, as in a bar of tqdm


class Progress:
    """Says beside the training bar what work is being done, if it takes longer than about a second.

    The first work of a name is shown at once, because nobody knows how long it will take; later ones if the last one
    took longer than a second, or after a second. Products with a curvature are counted; how many there will be is known
    from the last work of the same name. In the end the text is as it was before. Without a bar, with one that is off,
    and in processes that show none, nothing is done. Cost: two looks at the clock, and one for each product.
    """

    def __init__(self, clock: Clock = time.perf_counter) -> None:
        self._clock = clock
        self._last: dict[str, tuple[float, int]] = {}  # seconds and products of the last work of each name

    @contextmanager
    def showing(self, trainer: Any, name: str) -> Iterator[None]:
        """Shows that the work of the block goes on, by a name such as "hyper step"."""
        bar = _training_bar(trainer.progress_bar_callback)
        if bar is None:
            yield
            return
        work = _Work(name, *bar, *self._last.get(name, (math.inf, 0)), self._clock)
        try:
            with hearing_products(work.add_product):
                yield
        finally:
            self._last[name] = work.end()


class _Work:
    """One piece of work, and the text beside a bar.

    Args:
        name: What it is called.
        before: The text before.
        write: Replaces the text.
        seconds: How long it will take, as far as is known.
        products: How many products it will take; 0 if that is not known.
        clock: Returns seconds.
    """

    def __init__(
        self, name: str, before: str, write: Callable[[str], None], seconds: float, products: int, clock: Clock
    ) -> None:
        self._text = f"{before.rstrip(' :')}: {name}"
        self._before, self._write, self._clock = before, write, clock
        self._expected, self._products = products, 0
        self._began = self._written = clock()
        self._is_shown = seconds > _LONG
        if self._is_shown:
            write(self._text)

    def add_product(self) -> None:
        """Counts a product, and shows the number."""
        self._products += 1
        now = self._clock()
        if now - self._written > (_READABLE if self._is_shown else _LONG):
            self._is_shown, self._written = True, now
            whole = f" of about {self._expected}" if self._products <= self._expected else ""
            self._write(f"{self._text}, product {self._products}{whole}")

    def end(self) -> tuple[float, int]:
        """Puts the text back that was there before, and returns how many seconds and products it took."""
        if self._is_shown:
            self._write(self._before)
        return self._clock() - self._began, self._products


def _training_bar(callback: Any) -> tuple[str, Callable[[str], None]] | None:
    """Returns the text beside the training bar and a function that replaces it; None if no bar is shown.

    By what the bars of Lightning have in public, which are tqdm's bar and rich's task. A bar of another kind is left
    alone.
    """
    with suppress(TypeError, AssertionError):  # there is none yet
        bar: Any = getattr(callback, "train_progress_bar", None)
        if hasattr(bar, "set_description_str"):
            return None if bar.disable else (bar.desc, bar.set_description_str)
        if hasattr(bar, "description") and hasattr(callback, "progress"):
            update = callback.progress.update
            return bar.description, lambda text: update(bar.id, description=text, refresh=True)
    return None
