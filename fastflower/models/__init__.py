"""The networks, by name."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Literal

from fastflower.errors import UserError

if TYPE_CHECKING:
    from torch import nn

MODEL_NAMES = ("plain18", "plain34", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152")

Shortcut = Literal["A", "B", "C"]
BottleneckStride = Literal["3x3", "1x1"]
Norm = Literal["torch", "triton"]
NormChoice = Literal["auto", "torch", "triton"]


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

    See `fastflower.models.resnet.ResNet` for the options.

    Raises:
        UserError: an unknown name, or an option that has no effect on this network.
    """
    if name not in MODEL_NAMES:
        near = difflib.get_close_matches(name, MODEL_NAMES, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise UserError(f"model.name is {name!r}, which is unknown{hint}: choose one of {', '.join(MODEL_NAMES)}.")
    from fastflower.models.resnet import ResNet  # imports torch, which a list of names does not need

    return ResNet(
        name,
        num_classes,
        shortcut=shortcut,
        bottleneck_stride=bottleneck_stride,
        zero_init_gamma=zero_init_gamma,
        norm=norm,
        sync_norm=sync_norm,
    )
