"""Testing a picture by several views: ten crops, or all positions at several scales, averaged as probabilities.

By section 3.4 of "Deep Residual Learning": the network is applied to the whole picture as a convolution, its average
pooling with the window of the training size at stride 1, its last layer as a 1x1 convolution.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

from fastflower.config import DataConfig
from fastflower.data.geometry import centered
from fastflower.errors import UserError
from fastflower.models import find_network

Scorer = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Views:
    """How a picture is looked at."""

    crops: int = 1  # 1 = the center; 10 = corners and center, and their mirror images
    scales: tuple[int, ...] = ()  # pixels of the shorter side, for all positions at each; empty = crops

    @property
    def suffix(self) -> str:
        """What the name of a result by these views ends in; nothing for one crop."""
        if self.scales:
            return "-scales-" + "-".join(map(str, self.scales))
        return f"-{self.crops}-crops" if self.crops > 1 else ""

    @property
    def title(self) -> str:
        """In words: "1 crop", "10 crops", "scales 224, 256"."""
        if self.scales:
            return f"scales {', '.join(map(str, self.scales))}"
        return f"{self.crops} crop{'s' * (self.crops > 1)}"

    @property
    def whole(self) -> bool:
        """Whether the scorer takes whole resized pictures, and not their center."""
        return self.crops > 1 or bool(self.scales)

    def passes(self, data: DataConfig) -> list[DataConfig]:
        """The geometry of each pass over the records."""
        return [replace(data, val_resize=scale) for scale in self.scales] or [data]

    def check(self, data: DataConfig, model: str) -> None:
        """Raise UserError where they do not fit together, the data's geometry or the network of that name."""
        if self.crops not in (1, 10):
            raise UserError(f"crops is {self.crops}: give 1, the center, or 10.")
        if self.scales and not find_network(model).global_pooling:
            raise UserError(
                f"--scales needs a network that ends in global average pooling, which {model} does not: give --crops "
                "10."
            )
        if self.crops > 1 and self.scales:
            raise UserError(
                "--crops 10 and --scales are two ways to test: give one (--scales sees the mirror images and all "
                "positions already)."
            )
        if len(set(self.scales)) < len(self.scales):
            raise UserError(f"--scales {','.join(map(str, self.scales))} names a size twice: give each once.")
        if small := [scale for scale in self.scales if scale < data.crop]:
            raise UserError(
                f"--scales {small[0]} is smaller than data.crop, the {data.crop} pixels that the network was trained "
                "on: give larger ones."
            )
        if self.crops > 1 and data.val_resize == data.crop:
            raise UserError(
                f"data.val_resize and data.crop are both {data.crop} pixels, of which there is one crop and not ten: "
                "give --scales, or --crops 1."
            )

    def scorer(self, network: nn.Module, crop: int, *, compiled: bool = False) -> Scorer:
        """From a pass's pictures [N, 3, H, W] (see `whole`) to scores [N, num_classes], whose softmax is probabilities.

        Args:
            network: gives logits for images of the training crop; with `scales`, by its parts `features` and `fc`.
            crop: pixels.
            compiled: by torch.compile, with shapes as variables, so that not every new shape is compiled anew.
        """
        compiler = partial(torch.compile, dynamic=True) if compiled else lambda function: function
        if self.scales:
            features, fc = compiler(cast(Scorer, network.features)), cast(nn.Linear, network.fc)
            return partial(all_positions, features, fc, window_of(network, crop))
        return partial(ten_crops, compiler(network), crop) if self.crops > 1 else compiler(network)


def ten_crops(network: Scorer, crop: int, images: torch.Tensor) -> torch.Tensor:
    """Corners and center of each picture and of its mirror image, as torchvision's TenCrop cuts them.

    Args:
        network: logits [N, num_classes] for images [N, 3, crop, crop].
        crop: pixels.
        images: [N, 3, H, W], no side smaller than `crop`.

    Returns:
        [N, num_classes], see `log_mean_probabilities`.
    """
    bottom, right = images.shape[2] - crop, images.shape[3] - crop
    places = [(0, 0), (0, right), (bottom, 0), (bottom, right), (centered(bottom), centered(right))]
    return log_mean_probabilities(
        network(picture[..., top : top + crop, left : left + crop].contiguous(memory_format=torch.channels_last))
        for picture in (images, images.flip(3))
        for top, left in places
    )


def all_positions(features: Scorer, fc: nn.Linear, window: int, images: torch.Tensor) -> torch.Tensor:
    """Each picture and its mirror image at all positions of the training crop that the network's stride leaves.

    Args:
        features: the map before the average pooling, [N, C, h, w] for images [N, 3, H, W].
        fc: the last layer.
        window: side of that map for the training crop.
        images: [N, 3, H, W], no side smaller than the training crop.

    Returns:
        [N, num_classes], see `log_mean_probabilities`.
    """
    weight = fc.weight[:, :, None, None]
    return log_mean_probabilities(
        F.conv2d(F.avg_pool2d(features(view), window, stride=1), weight, fc.bias)
        for view in (images.clone(), images.flip(3))  # a compiler takes both for the same kind of tensor
    )


@torch.no_grad()
def window_of(network: nn.Module, crop: int) -> int:
    """Side of the network's map before the average pooling for pictures of the training crop."""
    picture = next(network.parameters()).new_zeros(1, 3, crop, crop)
    return cast(Scorer, network.eval().features)(picture).shape[2]


def log_mean_probabilities(logits: Iterable[torch.Tensor]) -> torch.Tensor:
    """Logarithm of the class probabilities' mean over views and positions, [N, num_classes] float32.

    NaN where a logit of some view is not finite, as a mean would hide.

    Args:
        logits: of each view, [N, num_classes] or, with positions, [N, num_classes, h, w].
    """
    views = torch.cat([of_view.float().log_softmax(1).reshape(*of_view.shape[:2], -1) for of_view in logits], dim=2)
    sound = views.isfinite().all(2).all(1, keepdim=True)
    return torch.where(sound, views.logsumexp(2) - math.log(views.shape[2]), torch.nan)
