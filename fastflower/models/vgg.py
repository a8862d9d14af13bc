"""VGG of "Very Deep Convolutional Networks for Large-Scale Image Recognition" (Simonyan, Zisserman 2014), table 1.

Modules are numbered as torchvision has them, so that weights load from there and load there.
"""

from __future__ import annotations

from torch import nn

from fastflower.models.layers import Classic
from fastflower.models.names import Network

WIDTHS = (64, 128, 256, 512, 512)  # channels in each of the five stages


class VGG(Classic):
    """The network without BatchNorm. It takes images [N, 3, H, W] from 32 pixels a side on."""

    def __init__(self, network: Network, num_classes: int) -> None:
        """Build with He initialization.

        Args:
            network: its depths are the 3x3 convolutions in each of the five stages, after which the maximum of 2x2 is
                taken: configurations D and E.
            num_classes: outputs.
        """
        layers: list[nn.Module] = []
        channels = 3
        for width, depth in zip(WIDTHS, network.depths, strict=True):
            for _ in range(depth):
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)]
                channels = width
            layers.append(nn.MaxPool2d(2))
        classifier = nn.Sequential(
            *(nn.Linear(channels * 7 * 7, 4096), nn.ReLU(inplace=True), nn.Dropout(0.5)),
            *(nn.Linear(4096, 4096), nn.ReLU(inplace=True), nn.Dropout(0.5)),
            nn.Linear(4096, num_classes),
        )
        super().__init__(nn.Sequential(*layers), 7, classifier)
