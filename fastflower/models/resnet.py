"""Plain and residual networks of "Deep Residual Learning for Image Recognition" (He, Zhang, Ren, Sun 2015), table 1.

Modules are named and ordered as torchvision has them, so that weights load from there and load there.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

from fastflower.models.layers import BNReLU, Forked, both
from fastflower.models.names import BottleneckStride, Network, Norm, Shortcut


class ResNet(nn.Module):
    """A plain or residual network: a stem, four stages of blocks, average pooling and a linear layer."""

    def __init__(
        self,
        network: Network,
        num_classes: int,
        *,
        shortcut: Shortcut = "B",
        bottleneck_stride: BottleneckStride = "3x3",
        zero_init_gamma: bool = False,
        norm: Norm = "torch",
        sync_norm: bool = False,
    ) -> None:
        """Build with He initialization.

        Args:
            network: its depths are the blocks in each of the four stages.
            num_classes: outputs.
            shortcut: A = identity, with zero padding where dimensions grow; B = identity, with a projection there;
                C = a projection in every block. Plain networks have none of these.
            bottleneck_stride: the convolution that subsamples in bottleneck blocks: "3x3" (v1.5, torchvision's) or
                "1x1" (v1, the paper's).
            zero_init_gamma: start the last BatchNorm of each residual block at gamma 0, so that the block begins as
                its shortcut (Goyal et al. 2017, "Accurate, Large Minibatch SGD", section 5.1).
            norm: how BatchNorm and ReLU are computed, see BNReLU. With "triton" residual blocks hand on their output
                forked, as a pair.
            sync_norm: take batch statistics over all ranks; "triton" only.
        """
        super().__init__()
        kind = shortcut if network.shortcuts else None
        bn_relu = partial(BNReLU, norm=norm, sync=sync_norm)

        def block(inputs: int, width: int, stride: int) -> BasicBlock | Bottleneck:
            if network.bottlenecks:
                return Bottleneck(inputs, width, stride, kind, bottleneck_stride, bn_relu)
            return BasicBlock(inputs, width, stride, kind, bn_relu)

        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = bn_relu(64)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        channels, stages = 64, []
        for width, stride, depth in zip((64, 128, 256, 512), (1, 2, 2, 2), network.depths, strict=True):
            first = block(channels, width, stride)
            channels = width * first.expansion
            stages.append(nn.Sequential(first, *(block(channels, width, 1) for _ in range(depth - 1))))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)
        self._initialize(zero_init_gamma)

    def _initialize(self, zero_init_gamma: bool) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                # He et al. 2015, "Delving Deep into Rectifiers", eq. 14: the gradients keep their variance
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif zero_init_gamma and isinstance(module, BasicBlock | Bottleneck):
                last = module.bn3 if isinstance(module, Bottleneck) else module.bn2
                nn.init.zeros_(last.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images [N, 3, H, W] to logits [N, num_classes]."""
        logits: torch.Tensor = self.fc(self.avgpool(self.features(x)).flatten(1))
        return logits

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """Images [N, 3, H, W] to the map before the average pooling, [N, C, ceil(H / 32), ceil(W / 32)]."""
        x = self.maxpool(self.bn1(self.conv1(x)))
        x, _ = both(self.layer4(self.layer3(self.layer2(self.layer1(x)))))
        return x


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut around them; in a plain network, only the convolutions."""

    expansion = 1

    def __init__(
        self, inputs: int, width: int, stride: int, kind: Shortcut | None, bn_relu: Callable[..., BNReLU]
    ) -> None:
        super().__init__()
        self.conv1 = _conv(inputs, width, 3, stride)
        self.bn1 = bn_relu(width)
        self.conv2 = _conv(width, width, 3)
        self.bn2 = _last_norm(bn_relu, width, kind)
        self.downsample = _shortcut(kind, inputs, width, stride)

    def forward(self, x: torch.Tensor | Forked) -> torch.Tensor | Forked:
        """[N, inputs, H, W] to [N, width, ceil(H / stride), ceil(W / stride)]."""
        x, shortcut = both(x)
        residual, residual_norm = _residual(self.downsample, shortcut, self.bn2)
        output: torch.Tensor | Forked = self.bn2(self.conv2(self.bn1(self.conv1(x))), residual, residual_norm)
        return output


class Bottleneck(nn.Module):
    """A 1x1 convolution to fewer channels, a 3x3, and a 1x1 back to four times as many; a shortcut around them."""

    expansion = 4

    def __init__(
        self,
        inputs: int,
        width: int,
        stride: int,
        kind: Shortcut | None,
        stride_on: BottleneckStride,
        bn_relu: Callable[..., BNReLU],
    ) -> None:
        super().__init__()
        outputs = width * self.expansion
        self.conv1 = _conv(inputs, width, 1, stride if stride_on == "1x1" else 1)
        self.bn1 = bn_relu(width)
        self.conv2 = _conv(width, width, 3, stride if stride_on == "3x3" else 1)
        self.bn2 = bn_relu(width)
        self.conv3 = _conv(width, outputs, 1)
        self.bn3 = _last_norm(bn_relu, outputs, kind)
        self.downsample = _shortcut(kind, inputs, outputs, stride)

    def forward(self, x: torch.Tensor | Forked) -> torch.Tensor | Forked:
        """[N, inputs, H, W] to [N, 4 * width, ceil(H / stride), ceil(W / stride)]."""
        x, shortcut = both(x)
        residual, residual_norm = _residual(self.downsample, shortcut, self.bn3)
        x = self.conv3(self.bn2(self.conv2(self.bn1(self.conv1(x)))))
        output: torch.Tensor | Forked = self.bn3(x, residual, residual_norm)
        return output


class ZeroPad(nn.Module):
    """Shortcut A where dimensions grow: every stride-th pixel, and zeros for the new channels. No parameters."""

    def __init__(self, new_channels: int, stride: int) -> None:
        super().__init__()
        self.new_channels, self.stride = new_channels, stride

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, C, H, W] to [N, C + new_channels, ceil(H / stride), ceil(W / stride)], in x's memory format."""
        # Pooling over one pixel subsamples as a strided slice does, but a slice and its gradient lose channels-last.
        return F.pad(F.avg_pool2d(x, 1, self.stride), (0, 0, 0, 0, 0, self.new_channels))


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)


def _last_norm(bn_relu: Callable[..., BNReLU], channels: int, kind: Shortcut | None) -> BNReLU:
    """The norm at a block's end, whose output the next block uses twice where there are shortcuts."""
    norm = bn_relu(channels)
    norm.fork = norm.norm == "triton" and kind is not None
    return norm


def _residual(
    downsample: nn.Module | None, x: torch.Tensor, last_norm: BNReLU
) -> tuple[torch.Tensor | None, nn.BatchNorm2d | None]:
    """What the last norm adds; and a projection's own norm, which the kernels compute together with the last one."""
    if downsample is None:
        return None, None
    if isinstance(downsample, nn.Sequential) and last_norm.norm == "triton":
        return downsample[0](x), cast(nn.BatchNorm2d, downsample[1])
    return downsample(x), None


def _shortcut(kind: Shortcut | None, inputs: int, outputs: int, stride: int) -> nn.Module | None:
    if kind is None:
        return None
    if kind == "C" or (kind == "B" and inputs != outputs):
        return nn.Sequential(_conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))
    return nn.Identity() if inputs == outputs else ZeroPad(outputs - inputs, stride)
