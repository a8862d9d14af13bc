"""The networks, by name."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Literal

from fastflower.errors import UserError

if TYPE_CHECKING:
    from torch import nn

PLAIN = ("plain18", "plain34")
BOTTLENECKS = ("resnet50", "resnet101", "resnet152")
RESIDUAL = ("resnet18", "resnet34", *BOTTLENECKS)
# Without BatchNorm, and with fully connected layers where the others average over all positions.
CLASSICS = ("vgg16", "vgg19", "alexnet")
MODEL_NAMES = PLAIN + RESIDUAL + CLASSICS

# Fewest pixels a side of which their pooling layers leave something; the others take any picture.
_MIN_SIZES = {"vgg16": 32, "vgg19": 32, "alexnet": 63}

Shortcut = Literal["A", "B", "C"]
BottleneckStride = Literal["3x3", "1x1"]
Norm = Literal["torch", "triton"]
NormChoice = Literal["auto", "torch", "triton"]


def min_size(name: str) -> int:
    """Side of the smallest pictures that the network takes (pixels)."""
    return _MIN_SIZES.get(name, 1)


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

    H and W are at least `min_size`. See `fastflower.models.resnet.ResNet` for the options.

    Raises:
        UserError: an unknown name, or an option that has no effect on this network.
    """
    if name not in MODEL_NAMES:
        near = difflib.get_close_matches(name, MODEL_NAMES, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise UserError(f"model.name is {name!r}, which is unknown{hint}: choose one of {', '.join(MODEL_NAMES)}.")
    _refuse_idle_options(name, shortcut, bottleneck_stride, zero_init_gamma, norm, sync_norm)
    if name == "alexnet":  # (the networks import torch, which a list of names does not need)
        from fastflower.models.alexnet import AlexNet

        return AlexNet(num_classes)
    if name in CLASSICS:
        from fastflower.models.vgg import VGG

        return VGG(name, num_classes)
    from fastflower.models.resnet import ResNet

    return ResNet(
        name,
        num_classes,
        shortcut=shortcut,
        bottleneck_stride=bottleneck_stride,
        zero_init_gamma=zero_init_gamma,
        norm=norm,
        sync_norm=sync_norm,
    )


def _refuse_idle_options(
    name: str,
    shortcut: Shortcut,
    bottleneck_stride: BottleneckStride,
    zero_init_gamma: bool,
    norm: Norm,
    sync_norm: bool,
) -> None:
    idle = {
        f"model.shortcut {shortcut} has no effect on {name}, which has no shortcuts": (
            name not in RESIDUAL and shortcut != "B"
        ),
        f"model.zero_init_gamma has no effect on {name}, which has no residual blocks": (
            name not in RESIDUAL and zero_init_gamma
        ),
        f"model.bottleneck_stride {bottleneck_stride} has no effect on {name}, which has no bottlenecks": (
            name not in BOTTLENECKS and bottleneck_stride != "3x3"
        ),
        f"model.sync_norm has no effect on {name}, which has no BatchNorm": name in CLASSICS and sync_norm,
        f"model.norm {norm} has no effect on {name}, which has no BatchNorm": name in CLASSICS and norm == "triton",
    }
    for problem, holds in idle.items():
        if holds:
            raise UserError(f"{problem}: leave it out.")
