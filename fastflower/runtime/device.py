"""Which device and which number type a run computes with."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from fastflower import machine
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


def node_of_gpu(number: int, sources: machine.Sources = machine.LINUX) -> int | None:
    """The NUMA node that a GPU is at; None where that is not known."""
    gpu = torch.cuda.get_device_properties(number)
    domain, bus, slot = (
        getattr(gpu, f"pci_{part}_id") for part in ("domain", "bus", "device")
    )  # torch's stub lacks them
    return machine.node_of(f"{domain:04x}:{bus:02x}:{slot:02x}.0", sources)


@contextlib.contextmanager
def near(device: torch.device, sources: machine.Sources = machine.LINUX) -> Iterator[None]:
    """Keep this process to the processors of its GPU's NUMA node until the block ends.

    There its threads read, decode and take pinned memory: from another node, all that goes to the GPU would cross the
    link between the processors. A process that somebody has bound already stays so, and so does one whose GPU's node is
    not known, or of whose processors it may use none.
    """
    before = os.sched_getaffinity(0)
    node = None
    if device.type == "cuda" and machine.nodes(sources) > 1 and not machine.is_bound(sources):
        node = node_of_gpu(device.index, sources)
    processors = before if node is None else before & machine.cpus_of(node, sources)
    if not processors or processors == before:
        yield
        return
    machine.bind(processors)
    try:
        yield
    finally:
        machine.bind(before)


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
        "(--amp-dtype bf16 forces it).",
    )


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bf16 in hardware (AVX512_BF16, AMX or Arm's BF16)."""
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "amx_tile", "bf16"))
