"""What the benchmarks' tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from bench.harness import compute
from fastflower.runtime.distributed import Ranks


@pytest.fixture
def on_a_small_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No GPU, one thread, one worker process, and a ceiling that is quickly measured."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(compute, "SIDE", {"cpu": 64})
    monkeypatch.setattr(Ranks, "cores", 1)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny pictures; more threads wait for each other on a busy machine
    yield
    torch.set_num_threads(threads)
