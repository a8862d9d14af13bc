"""AlexNet in one tower, of "One weird trick for parallelizing convolutional neural networks" (Krizhevsky 2014).

Sizes are torchvision's, and modules are numbered as there, so that weights load from there and load there.
"""

from __future__ import annotations

from torch import nn

from fastflower.models.layers import Classic
from fastflower.models.names import Network


class AlexNet(Classic):
    """The network. It takes images [N, 3, H, W] from 63 pixels a side on."""

    def __init__(self, network: Network, num_classes: int) -> None:
        """Build with He initialization."""
        features = nn.Sequential(
            *(nn.Conv2d(3, 64, 11, stride=4, padding=2), nn.ReLU(inplace=True), nn.MaxPool2d(3, stride=2)),
            *(nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(inplace=True), nn.MaxPool2d(3, stride=2)),
            *(nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(inplace=True)),
            *(nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(inplace=True)),
            *(nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(3, stride=2)),
        )
        classifier = nn.Sequential(
            *(nn.Dropout(0.5), nn.Linear(256 * 6 * 6, 4096), nn.ReLU(inplace=True)),
            *(nn.Dropout(0.5), nn.Linear(4096, 4096), nn.ReLU(inplace=True)),
            nn.Linear(4096, num_classes),
        )
        super().__init__(features, 6, classifier)
