"""Batch statistics over ranks (SyncBatchNorm), in two gloo processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fastflower.kernels.batch_norm import bn_relu
from torch import nn

ROOT = Path(__file__).parents[2]


def run_worker(*arguments: str, interpret: bool) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--",
         str(Path(__file__).with_name("sync_worker.py")), *arguments],
        capture_output=True,
        text=True,
        timeout=200,
        cwd=ROOT,
        env=environment | {"TRITON_INTERPRET": "1" if interpret else "0"},
        check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr


def test_ranks_find_what_one_process_finds_eager_and_compiled() -> None:
    run_worker("networks", interpret=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton runs on the GPU here, which gloo's tensors are not on")
def test_triton_kernels_merge_over_ranks() -> None:
    run_worker(interpret=True)


def test_never_silently_local() -> None:
    norm = nn.BatchNorm2d(3)
    with pytest.raises(RuntimeError, match="process group"):
        bn_relu(torch.randn(2, 3, 4, 4), norm, sync=True)
    assert norm.num_batches_tracked == 0, "a refused batch is not counted"
