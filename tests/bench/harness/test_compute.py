"""The ceiling that MFU is a share of."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.harness import compute
from bench.harness.compute import COPIES, copy_gb_per_s, matmul_flops_per_s

CPU = torch.device("cpu")


@pytest.mark.parametrize("faster", [0, 1])
def test_the_faster_library_counts_and_flops_are_those_of_its_product(
    faster: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def rate(flops: int, product: Callable[..., torch.Tensor], a: torch.Tensor, b: torch.Tensor) -> float:
        with FlopCounterMode(display=False) as counter:
            product(a, b)
        # at the borders a convolution skips products with zeros, which count all the same
        assert counter.get_total_flops() == flops
        asked.append(flops)
        return 2.0 if len(asked) - 1 == faster else 1.0

    monkeypatch.setattr(compute, "SIDE", {"cpu": 64})
    monkeypatch.setattr(compute, "_rate", rate)
    assert matmul_flops_per_s(torch.float32, CPU) == 2.0
    assert asked == [2 * 64**3, 2 * 64 * 49 * 9 * 16**2]


def test_a_rate_is_the_median_without_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    times_ms = iter([9e3, 1e3, 4e3, 2e3, 3e3, 5e3])
    monkeypatch.setattr(compute, "elapsed_ms", lambda *_: next(times_ms))
    assert compute._rate(30, torch.matmul, torch.ones(1), torch.ones(1)) == 10.0


def test_a_copy_counts_what_it_reads_and_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    times_ms = iter([9e3, 1e3, 4e3, 2e3, 3e3, 5e3])
    monkeypatch.setattr(compute, "elapsed_ms", lambda *_: next(times_ms))
    monkeypatch.setattr(compute, "cache_bytes", lambda device: 1000)
    assert copy_gb_per_s(CPU) == pytest.approx(2 * 3000 * COPIES / 3 / 1e9)
