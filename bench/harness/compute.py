"""How much this machine can compute and copy: what rates are a share of."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F

from bench.harness.timing import elapsed_ms
from fastflower.runtime.device import cpu_has_bf16

SIDE = {"cpu": 2048, "cuda": 8192}  # of the matrices: large enough for the highest rate
REPEATS = 5  # that are timed
COPIES = 10  # of each


def matmul_flops_per_s(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of products of large matrices, on all threads: the median of a few; 2 FLOPs a multiply-add.

    float32 is multiplied as convolutions do it: on a GPU in TF32 where torch allows it to them. A CPU without bf16
    instructions is measured in float32, which it is faster in. On a CPU convolutions come from another library than
    torch.matmul, which may be the faster one: the higher rate counts.
    """
    if device.type == "cpu" and not (dtype == torch.bfloat16 and cpu_has_bf16()):
        dtype = torch.float32
    n = SIDE[device.type]
    rates = [_rate(2 * n**3, torch.matmul, *_random((n, n), (n, n), dtype=dtype, device=device))]
    if device.type == "cpu":
        channels = n // 4  # a product of matrices [64 * 7 * 7, 9 * channels] and [9 * channels, channels]
        operands = _random((64, channels, 7, 7), (channels, channels, 3, 3), dtype=dtype, device=device)
        rates.append(_rate(2 * 64 * 7 * 7 * 9 * channels**2, partial(F.conv2d, padding=1), *operands))
    return max(rates)


def copy_gb_per_s(device: torch.device) -> float:
    """What a plain copy reads and writes in a second; the buffers are three times the cache."""
    source, target = (torch.zeros(3 * cache_bytes(device), dtype=torch.uint8, device=device) for _ in range(2))

    def work() -> None:
        for _ in range(COPIES):
            target.copy_(source)

    return 2 * source.nbytes * COPIES / _steady_ms(work, device, COPIES) / 1e6


def cache_bytes(device: torch.device) -> int:
    """Size of the GPU's L2 cache, or of a CPU core's last."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    return max((1024 * int(path.read_text().strip().removesuffix("K")) for path in sizes), default=2**25)


def _random(*shapes: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> list[torch.Tensor]:
    tensors = [torch.randn(shape, device=device).to(dtype) for shape in shapes]
    return [tensor.to(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor for tensor in tensors]


def _rate(flops: int, product: Callable[..., torch.Tensor], a: torch.Tensor, b: torch.Tensor) -> float:
    """FLOP/s of a product."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    try:
        return 1000 * flops / _steady_ms(partial(product, a, b), a.device)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def _steady_ms(work: Callable[[], object], device: torch.device, calls: int = 1) -> float:
    """The median of a few times; the first one, in which libraries are loaded, does not count."""
    with warnings.catch_warnings(action="ignore"):
        elapsed_ms(work, device, calls)
    return median(elapsed_ms(work, device, calls) for _ in range(REPEATS))
