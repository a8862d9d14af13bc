"""The sentence on what limits the speed, for each cause."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.contenders.loaders import DECODE, OURS
from bench.rates import bottleneck

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("whole", "decode", "transfer_s", "wanted"),
    [
        (1000, 1500, 0.0, "Bottleneck: decode, 0.67 of the loader's 1.00 ms a picture: keep decoded pictures"),
        (1000, 4000, 0.0, "Bottleneck: augmentation, 0.75 of the loader's 1.00 ms a picture: lower --scale"),
        (1000, 5000, 0.0006, "Bottleneck: transfer, 0.60 of the loader's 1.00 ms a picture: let the GPU decode"),
        (1000, 900, 0.0, "Bottleneck: decode, 1.11 of the loader's 1.00 ms a picture"),
    ],
)
def test_the_longest_part_of_the_loader(whole: float, decode: float, transfer_s: float, wanted: str) -> None:
    rows = {OURS: {"images_per_s": whole}, DECODE: {"images_per_s": decode}}
    assert bottleneck.of_loader(rows, transfer_s).startswith(wanted)


@pytest.mark.parametrize(("wait", "expected"), [(0.1, False), (0.2, False), (0.21, True)])
def test_waiting_much_points_to_the_loader(wait: float, expected: bool) -> None:
    assert bottleneck.is_loader({"data_wait": wait}) is expected


def row(*, compiled: bool = False) -> dict[str, Any]:
    return {"name": "resnet18", "compiled": compiled, "ms_per_step": 100.0, "data_wait": 0.1, "mfu": 0.42}


def test_communication_is_what_other_processes_add() -> None:
    # 90 ms are busy, of which 45 would be needed without others
    assert bottleneck.of_network(row(), CPU, "fp32", alone_ms=45.0).startswith(
        "Bottleneck: communication, 50% of a step (90.0 ms, 45.0 without other processes): raise --batch"
    )
    assert bottleneck.of_network(row(), CPU, "fp32", alone_ms=80.0).startswith("Bottleneck: compute, at 42% of")


@pytest.mark.parametrize(
    ("compiled", "dtype", "bf16", "wanted"),
    [
        (False, "fp32", True, "try --dtype bf16, --compile on, a larger --batch or a smaller network"),
        (True, "fp32", False, "try a larger --batch or a smaller network"),
        (False, "bf16", True, "try --compile on, a larger --batch or a smaller network"),
    ],
)
def test_compute_names_what_is_not_used_yet(
    compiled: bool, dtype: str, bf16: bool, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bottleneck, "cpu_has_bf16", lambda: bf16)
    assert wanted in bottleneck.of_network(row(compiled=compiled), CPU, dtype)
