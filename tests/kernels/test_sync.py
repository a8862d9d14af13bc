"""Batch statistics over ranks (SyncBatchNorm), in two gloo processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from fastflower.kernels.batch_norm import bn_relu
from tests.kernels import sync_worker
from tests.processes import in_ranks, torchrun


def test_ranks_find_what_one_process_finds_eager_and_compiled() -> None:
    result = in_ranks(sync_worker.main, "networks", TRITON_INTERPRET="0")
    assert result.code == 0, result.err


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton runs on the GPU here, which gloo's tensors are not on")
def test_triton_kernels_merge_over_ranks() -> None:
    worker = Path(__file__).with_name("sync_worker.py")
    result = torchrun(worker, limit_s=200, environment={"TRITON_INTERPRET": "1"})
    assert result.returncode == 0, result.stderr


def test_never_silently_local() -> None:
    norm = nn.BatchNorm2d(3)
    with pytest.raises(RuntimeError, match="process group"):
        bn_relu(torch.randn(2, 3, 4, 4), norm, sync=True)
    assert norm.num_batches_tracked == 0, "a refused batch is not counted"
