"""The networks, by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastflower.errors import UserError
from fastflower.models.names import (
    NETWORKS,
    BottleneckStride,
    Network,
    Norm,
    NormChoice,
    Shortcut,
    architecture,
    find_network,
)

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "NETWORKS",
    "BottleneckStride",
    "Network",
    "Norm",
    "NormChoice",
    "Shortcut",
    "architecture",
    "create_model",
    "find_network",
]


def create_model(
    name: str,
    num_classes: int,
    *,
    shortcut: Shortcut = "B",
    bottleneck_stride: BottleneckStride = "3x3",
    zero_init_gamma: bool = False,
    norm: Norm = "torch",
    sync_norm: bool = False,
) -> nn.Module:
    """A network with fresh weights, which gives logits [N, num_classes] for images [N, 3, H, W].

    H and W are at least its record's `min_size`. See `fastflower.models.resnet.ResNet` for the options.

    Raises:
        UserError: an unknown name, or an option that has no effect on this network.
    """
    network = find_network(name)
    options: dict[str, Any] = {}
    for option, value, default, has_it, what in (
        ("shortcut", shortcut, "B", network.shortcuts, "shortcuts"),
        ("zero_init_gamma", zero_init_gamma, False, network.shortcuts, "residual blocks"),
        ("bottleneck_stride", bottleneck_stride, "3x3", network.bottlenecks, "bottlenecks"),
        ("sync_norm", sync_norm, False, network.batch_norm, "BatchNorm"),
        ("norm", norm, "torch", network.batch_norm, "BatchNorm"),
    ):
        if has_it:
            options[option] = value
        elif value != default:
            given = option if value is True else f"{option} {value}"
            raise UserError(f"model.{given} has no effect on {name}, which has no {what}: leave it out.")
    return network.load()(network, num_classes, **options)
