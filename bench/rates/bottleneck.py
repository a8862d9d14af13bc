"""What limits the speed, in one sentence made of what was measured, and what to change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from bench.contenders.loaders import DECODE, OURS
from fastflower.runtime.device import cpu_has_bf16

MUCH = 0.2  # share of the time that makes waiting for data, or for other processes, the bottleneck
CHANGE = {
    "decode": "keep decoded pictures in memory (data.cache), read smaller stored ones (--sizes), give DALI more cores "
    "(--threads) or decode on a GPU",
    "augmentation": "lower --scale or --crop, give DALI more cores (--threads) or augment on a GPU (data.decoder)",
    "transfer": "let the GPU decode (data.decoder gpu), so that only encoded pictures travel to it",
    "communication": "raise --batch, so that gradients travel less often, or link the processes faster",
}


def of_loader(rows: Mapping[str, Mapping[str, Any]], transfer_s: float) -> str:
    """The longest part of the loader's time a picture.

    Args:
        rows: by name, of the whole loader and, unless its pictures are decoded before, of DALI's decoder alone.
        transfer_s: seconds a picture to the GPU.
    """
    whole = 1 / rows[OURS]["images_per_s"]
    decode = 1 / rows[DECODE]["images_per_s"] if DECODE in rows else 0.0
    parts = {"decode": decode, "transfer": transfer_s, "augmentation": max(0.0, whole - decode - transfer_s)}
    longest = max(parts, key=parts.__getitem__)
    return (
        f"Bottleneck: {longest}, {1000 * parts[longest]:.2f} of the loader's {1000 * whole:.2f} ms a picture: "
        f"{CHANGE[longest]}."
    )


def is_loader(row: Mapping[str, Any]) -> bool:
    """Whether a loop waits so long for data that its loader is the bottleneck."""
    data_wait: float = row.get("data_wait", 0.0)
    return data_wait > MUCH


def of_network(row: Mapping[str, Any], device: torch.device, dtype: str, alone_ms: float | None = None) -> str:
    """Compute or communication, where data does not limit.

    Args:
        row: of the loop or of the network.
        device: that it ran on.
        dtype: of its matrix products.
        alone_ms: milliseconds of a step without other processes and without waiting; None where there are none.
    """
    if alone_ms is not None:
        busy_ms = row["ms_per_step"] * (1 - row["data_wait"])
        share = 1 - alone_ms / busy_ms
        if share > MUCH:
            return (
                f"Bottleneck: communication, {share:.0%} of a step ({busy_ms:.1f} ms, {alone_ms:.1f} without other "
                f"processes): {CHANGE['communication']}."
            )
    changes = ["a larger --batch", "a smaller network or smaller pictures"]
    if not row["compiled"]:
        changes.insert(0, "--compile on")
    if dtype == "fp32" and (device.type == "cuda" or cpu_has_bf16()):
        changes.insert(0, "--dtype bf16")
    return (
        f"Bottleneck: compute, at {row['mfu']:.0%} of this machine's rate of matrix products: try "
        f"{', '.join(changes[:-1])} or {changes[-1]}."
    )
