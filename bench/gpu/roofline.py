"""The least time that a training step can take on a machine that multiplies and copies at measured rates.

The roofline model (Williams, Waterman and Patterson, 2009), layer by layer: each takes as long as its products or its
bytes do, whichever is longer. A convolution reads its input and weights and writes its output; backward it does that
twice, once for each gradient, with twice the products. BatchNorm, addition and ReLU move what our kernels move.
Pooling, the loss and the optimizer are left out, so that the time is a bound from below.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from bench.batch_norm.layers import find_layers
from fastflower.models import create_model


class Work(NamedTuple):
    """Of one layer in one direction."""

    flops: float
    bytes: float


def work_of_step(model: str, batch: int, size: int, dtype: torch.dtype, classes: int) -> list[Work]:
    """What each layer of a network has to do in a training step on [batch, 3, size, size] of `dtype`."""
    with torch.device("meta"):
        network = create_model(model, classes).eval()
        images = torch.empty(batch, 3, size, size)
    works: list[Work] = []

    def note(module: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
        assert isinstance(module, nn.Conv2d | nn.Linear)
        weight = module.weight
        macs = output.numel() * weight.numel() // weight.shape[0]
        moved = (args[0].numel() + weight.numel() + output.numel()) * dtype.itemsize
        first = args[0] is images  # no gradient of the pictures is needed
        works.append(Work(2 * macs, moved))
        works.append(Work(2 * macs * (1 if first else 2), moved * (1 if first else 2)))

    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(note)
    with torch.no_grad():
        network(images)
    for layer, number in find_layers(model, batch, size).items():
        works += [Work(0, number * moved) for moved in layer.bytes_moved(dtype)]
    return works


def least_seconds(works: list[Work], flops_per_s: float, bytes_per_s: float) -> float:
    """The sum over the layers of whichever takes longer."""
    return sum(max(work.flops / flops_per_s, work.bytes / bytes_per_s) for work in works)
