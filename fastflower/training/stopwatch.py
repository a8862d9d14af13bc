"""How long training takes, and how much of it is waiting."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TypeVar

T = TypeVar("T")


class Stopwatch:
    """Time of an epoch, and how much of it was spent waiting for batches."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self.waited_s = 0.0
        self.training_s = 0.0
        self.pictures = 0

    @property
    def elapsed_s(self) -> float:
        """Seconds since the epoch began."""
        return time.perf_counter() - self._start

    def waiting_for(self, items: Iterator[T]) -> Iterator[T]:
        """The same items; the time until each comes counts as waiting."""
        while True:
            asked = time.perf_counter()
            item = next(items, None)
            self.waited_s += time.perf_counter() - asked
            if item is None:
                return
            yield item
