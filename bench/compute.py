"""How much this machine can compute: what model FLOPs utilization (MFU) is a share of."""

from __future__ import annotations

import time
from statistics import median

import torch

from fastflower.engine.precision import cpu_has_bf16

SIDE = {"cpu": 2048, "cuda": 8192}  # of the matrices: large enough for the highest rate
PRODUCTS = 5  # that are timed


def matmul_flops_per_s(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of a product of large square matrices, on all threads: the median of a few; 2 FLOPs a multiply-add.

    float32 is multiplied as convolutions do it: on a GPU in TF32 where torch allows it to them. A CPU without bf16
    instructions is measured in float32, which it is faster in.
    """
    if device.type == "cpu" and not (dtype == torch.bfloat16 and cpu_has_bf16()):
        dtype = torch.float32
    n = SIDE[device.type]
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    try:
        seconds = [_seconds(a, b) for _ in range(1 + PRODUCTS)][1:]
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    return 2 * n**3 / median(seconds)


def _seconds(a: torch.Tensor, b: torch.Tensor) -> float:
    if a.is_cuda:
        torch.cuda.synchronize(a.device)
    began = time.perf_counter()
    torch.matmul(a, b)
    if a.is_cuda:
        torch.cuda.synchronize(a.device)
    return time.perf_counter() - began
