"""What processes send each other is what is counted, and what the documentation says."""

from __future__ import annotations

import json
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from bench.traffic import main, table, traffic
from fastflower.models import create_model
from fastflower.runtime.distributed import processes
from tests.conftest import ROOT
from tests.processes import in_ranks

CPU = torch.device("cpu")
NAMES = ("resnet18", "resnet50")
KINDS = ("gradients", "moments", "sums", "messages")


def train_a_step() -> None:
    """Forward and backward passes of small networks as one of two processes; prints the bytes that each gives."""
    all_reduce, all_gather, given = dist.all_reduce, dist.all_gather_into_tensor, dict.fromkeys(KINDS, 0)

    def reducing(tensor: torch.Tensor, *others: Any) -> Any:
        given["sums"] += tensor.nbytes
        return all_reduce(tensor, *others)

    def gathering(output: torch.Tensor, tensor: torch.Tensor) -> Any:
        given["moments"] += tensor.nbytes
        given["messages"] += 1
        return all_gather(output, tensor)

    def hook(given, bucket):  # type: ignore[no-untyped-def]  # whose annotations torch would read
        given["gradients"] += bucket.buffer().nbytes
        future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    with processes(CPU) as ranks:
        for name in NAMES:
            given.update(dict.fromkeys(KINDS, 0))
            network = create_model(name, 104, norm="triton", sync_norm=True).to(memory_format=torch.channels_last)
            exchanging = DistributedDataParallel(network)
            exchanging.register_comm_hook(given, hook)
            images = torch.randn(2, 3, 32, 32).contiguous(memory_format=torch.channels_last)
            with mock.patch.multiple(dist, all_reduce=reducing, all_gather_into_tensor=gathering):
                exchanging(images).sum().backward()
            if ranks.is_main:
                print(json.dumps(given))


def test_two_processes_exchange_what_is_counted() -> None:
    result = in_ranks(train_a_step, TRITON_INTERPRET="0")
    assert result.code == 0, result.err
    for name, line in zip(NAMES, result.out.splitlines(), strict=True):
        counted = traffic(create_model(name, 104))
        assert {kind: getattr(counted, kind) for kind in KINDS} == json.loads(line)


def test_the_documentation_has_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    printed = capsys.readouterr().out.strip()
    assert printed == table(NAMES, (8, 64, 512))
    assert printed in (ROOT / "docs/performance.md").read_text(encoding="utf-8")


def test_what_cannot_be_counted_is_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--models", "resnet19"]) == 2
    assert "there is no network resnet19" in capsys.readouterr().err
    assert main(["--gpus", "0"]) == 2
    assert "--gpus 0" in capsys.readouterr().err
