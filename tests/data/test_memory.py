"""Memory that batches use again."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from fastflower.data.memory import Memory


def take(memory: Memory, *shape: int) -> torch.Tensor:
    return torch.from_numpy(memory.take(shape, np.float32))


def test_it_is_used_again_when_nobody_holds_it() -> None:
    memory = Memory()
    first, second = take(memory, 10, 100), take(memory, 10, 100)
    assert first.shape == (10, 100)
    assert first.dtype == torch.float32
    assert first.data_ptr() != second.data_ptr()
    address = first.data_ptr()
    part = (first[3:] * torch.ones(1, requires_grad=True)).sum()  # autograd holds it
    del first
    assert take(memory, 10, 100).data_ptr() != address
    del part
    held = take(memory, 1000), take(memory, 1000)
    assert address in {tensor.data_ptr() for tensor in held}
    assert len({tensor.data_ptr() for tensor in (*held, second)}) == 3


@pytest.mark.parametrize(
    "part", [np.ndarray.view, lambda a: a[3:], lambda a: a[3:][1:].T, lambda a: a.reshape(-1)[5:6]]
)
def test_a_view_keeps_it_when_its_array_is_gone(part: Callable[[np.ndarray], np.ndarray]) -> None:
    memory = Memory()
    address = memory.take((10, 100), np.float32).ctypes.data
    view = part(memory.take((10, 100), np.float32))
    assert address <= view.ctypes.data < address + 4000
    assert memory.take((10, 100), np.float32).ctypes.data != address
    view[...] = 1
    del view
    assert address in {array.ctypes.data for array in [memory.take((10, 100), np.float32) for _ in range(2)]}


def test_another_size_takes_new_memory_and_drops_the_old() -> None:
    memory = Memory()
    take(memory, 1000)
    assert take(memory, 2000).shape == (2000,)
    assert not [free for free in memory._free if len(free) == 4000]
