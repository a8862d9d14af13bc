"""Many pictures as pieces of few, so that memory is bounded by bytes, however large the pictures are."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from fastflower.arrays import Ints


def pieces(sizes: Ints, most: int, count: int | None = None) -> Iterator[slice]:
    """Divide pictures, in their order, into pieces of at least one.

    Args:
        sizes: of the pictures in bytes, [n].
        most: bytes of a piece that has more than one.
        count: most pictures of a piece; None = any number.
    """
    ends = np.cumsum(sizes)
    start = 0
    while start < len(sizes):
        before = ends[start] - sizes[start]
        end = max(int(np.searchsorted(ends, before + most, side="right")), start + 1)
        if count is not None:
            end = min(end, start + count)
        yield slice(start, end)
        start = end
