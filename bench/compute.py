"""How much a network computes, and how much this machine can: what model FLOPs utilization (MFU) is made of."""

from __future__ import annotations

import copy
import time
from statistics import median

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fastflower.engine.precision import cpu_has_bf16

SIDE = {"cpu": 2048, "cuda": 8192}  # of the matrices: large enough for the highest rate
PRODUCTS = 5  # that are timed


def macs(network: nn.Module, size: int) -> int:
    """Multiply-adds of a forward pass of one picture [3, size, size], in convolutions and matrix products."""
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        copy.deepcopy(network).to("meta").eval()(torch.empty(1, 3, size, size))
    return counter.get_total_flops() // 2


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
