"""Memory for batches, which is used again.

New memory costs more than the arithmetic: the system clears each page when it is first written to.
"""

from __future__ import annotations

import math
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastflower.arrays import Bytes


def pageable(size: int) -> Bytes:
    """New memory, [size], as programs have it."""
    return np.empty(size, np.uint8)


def pinned(size: int) -> Bytes:
    """New memory, [size], that stays where it is, so that a GPU copies from it while the host goes on."""
    memory: Bytes = torch.empty(size, dtype=torch.uint8, pin_memory=True).numpy()
    return memory


class Memory:
    """Arrays of one kind at a time; an array's memory is free when nobody refers to it any more.

    One thread takes them; any may drop them.
    """

    def __init__(self, allocate: Callable[[int], Bytes] = pageable) -> None:
        """New memory comes from `allocate`."""
        self._allocate = allocate
        self._free: deque[Bytes] = deque()

    def take(self, shape: Sequence[int], dtype: type[np.generic]) -> NDArray[Any]:
        """An array of any values, whose memory is its own until it and all views and tensors of it are gone."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        while self._free and len(self._free[0]) != size:
            self._free.popleft()
        memory = self._free.popleft() if self._free else self._allocate(size)
        owner = np.frombuffer(memory.data, np.uint8)  # which every view refers to, whatever it is a view of
        weakref.finalize(owner, self._free.append, memory).atexit = False
        return owner.view(dtype).reshape(shape)
