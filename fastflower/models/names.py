"""The networks by name: one record each, which says what the rest of the program asks of it. torch is not imported."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from fastflower.errors import UserError

if TYPE_CHECKING:
    from torch import nn

Shortcut = Literal["A", "B", "C"]
BottleneckStride = Literal["3x3", "1x1"]
Norm = Literal["torch", "triton"]
NormChoice = Literal["auto", "torch", "triton"]

RESNET = "fastflower.models.resnet:ResNet"
VGG = "fastflower.models.vgg:VGG"
ALEXNET = "fastflower.models.alexnet:AlexNet"


@dataclass(frozen=True, kw_only=True)
class Network:
    """What is known of an architecture without building it.

    Its class is called as CLASS(network, num_classes, **options), with the options of `create_model` that act on what
    the network has; the others are refused.
    """

    name: str
    built_by: str  # MODULE:CLASS
    depths: tuple[int, ...] = ()  # blocks or convolutions in each stage
    batch_norm: bool = True  # it has BatchNorm, as BNReLU: the class takes norm and sync_norm
    shortcuts: bool = False  # it has residual blocks: the class takes shortcut and zero_init_gamma
    bottlenecks: bool = False  # the class takes bottleneck_stride
    global_pooling: bool = True  # it ends as fc(average of features(images) over all positions)
    min_size: int = 1  # side of the smallest pictures of which its pooling layers leave something (pixels)
    stride: int = 32  # pixels of the image for one position of its last map
    lr: float = 0.1  # learning rate from scratch, as in its paper
    weights: Mapping[str, str] = field(default_factory=dict)  # torchvision's files for ImageNet by their name there

    def load(self) -> Callable[..., nn.Module]:
        """Its class, which imports torch."""
        module, _, attribute = self.built_by.partition(":")
        network: Callable[..., nn.Module] = getattr(importlib.import_module(module), attribute)
        return network


def _resnet(name: str, depths: tuple[int, ...], *weights: str, bottlenecks: bool = False) -> Network:
    published = dict(zip(("IMAGENET1K_V1", "IMAGENET1K_V2"), weights, strict=False))
    return Network(
        name=name, built_by=RESNET, depths=depths, shortcuts=True, bottlenecks=bottlenecks, weights=published
    )


def _classic(name: str, built_by: str, depths: tuple[int, ...], weights: str, *, min_size: int) -> Network:
    """Without BatchNorm, and with fully connected layers where the others average over all positions."""
    return Network(
        name=name,
        built_by=built_by,
        depths=depths,
        batch_norm=False,
        global_pooling=False,
        min_size=min_size,
        lr=0.01,
        weights={"IMAGENET1K_V1": weights},
    )


NETWORKS = {
    network.name: network
    for network in (
        Network(name="plain18", built_by=RESNET, depths=(2, 2, 2, 2)),
        Network(name="plain34", built_by=RESNET, depths=(3, 4, 6, 3)),
        _resnet("resnet18", (2, 2, 2, 2), "resnet18-f37072fd.pth"),
        _resnet("resnet34", (3, 4, 6, 3), "resnet34-b627a593.pth"),
        _resnet("resnet50", (3, 4, 6, 3), "resnet50-0676ba61.pth", "resnet50-11ad3fa6.pth", bottlenecks=True),
        _resnet("resnet101", (3, 4, 23, 3), "resnet101-63fe2227.pth", "resnet101-cd907fc2.pth", bottlenecks=True),
        _resnet("resnet152", (3, 8, 36, 3), "resnet152-394f9c45.pth", "resnet152-f82ba261.pth", bottlenecks=True),
        _classic("vgg16", VGG, (2, 2, 3, 3, 3), "vgg16-397923af.pth", min_size=32),
        _classic("vgg19", VGG, (2, 2, 4, 4, 4), "vgg19-dcbb9e9d.pth", min_size=32),
        _classic("alexnet", ALEXNET, (), "alexnet-owt-7be5be79.pth", min_size=63),
    )
}


def find_network(name: str) -> Network:
    """The record of that name.

    Raises:
        UserError: there is none.
    """
    if name not in NETWORKS:
        near = difflib.get_close_matches(name, NETWORKS, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise UserError(f"model.name is {name!r}, which is unknown{hint}: choose one of {', '.join(NETWORKS)}.")
    return NETWORKS[name]


def architecture(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Of the settings under `model`, those that decide which weights there are and what is computed with them.

    Weights fit a network of the same architecture, and no other. What the other settings say (where weights start from,
    how BatchNorm is computed) leaves that as it is.
    """
    return {key: settings.get(key) for key in ("name", "shortcut", "bottleneck_stride")}
