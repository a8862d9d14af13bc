"""Which device and which number type a run computes with."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Literal

import torch

from fastflower.errors import UserError


@dataclass(frozen=True)
class Precision:
    """Mixed precision as it was decided for this machine."""

    dtype: torch.dtype | None  # of matrix products and convolutions under autocast; None = all in float32
    note: str | None = None  # a sentence for the user where it is not what they asked for

    def autocast(self, device: torch.device) -> contextlib.AbstractContextManager[None]:
        """The context that the forward pass runs in."""
        if self.dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(device.type, self.dtype)

    def __str__(self) -> str:
        return {None: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[self.dtype]


def choose_device(setting: Literal["auto", "cpu", "cuda"], local_rank: int = 0) -> torch.device:
    """The device of this process.

    Raises:
        UserError: a GPU is asked for and there is none for this process.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if setting == "cpu" or (setting == "auto" and not count):
        return torch.device("cpu")
    if local_rank >= count:
        raise UserError(
            f"process {local_rank} of this machine finds {count} GPUs: start at most one process for each GPU, "
            "or give --device cpu."
        )
    return torch.device("cuda", local_rank)


def choose_precision(amp: bool, dtype: Literal["auto", "bf16", "fp16"], device: torch.device) -> Precision:
    """bf16 on GPUs of compute capability 8.0 and later, fp16 on older ones; fp32 on a CPU without bf16 instructions.

    There autocast would be about 12 times slower than fp32. A named type is used wherever it is asked for.
    """
    if not amp:
        return Precision(None)
    if dtype != "auto":
        return Precision(torch.bfloat16 if dtype == "bf16" else torch.float16)
    if device.type == "cuda":
        return Precision(torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16)
    if cpu_has_bf16():
        return Precision(torch.bfloat16)
    return Precision(
        None,
        "--amp: this CPU has no bf16 instructions, which makes AMP much slower than fp32, so this runs in fp32 "
        "(--amp_dtype bf16 forces it).",
    )


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bf16 in hardware (AVX512_BF16, AMX or Arm's BF16)."""
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "amx_tile", "bf16"))
