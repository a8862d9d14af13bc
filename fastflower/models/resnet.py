"""Plain and residual networks of "Deep Residual Learning for Image Recognition" (He, Zhang, Ren, Sun 2015), table 1.

Modules are named as torchvision names them, so that weights load from there and load there.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from fastflower.errors import UserError
from fastflower.models.layers import BNReLU

Shortcut = Literal["A", "B", "C"]
BottleneckStride = Literal["3x3", "1x1"]

# Blocks in each of the four stages.
DEPTHS = {
    "plain18": (2, 2, 2, 2),
    "plain34": (3, 4, 6, 3),
    "resnet18": (2, 2, 2, 2),
    "resnet34": (3, 4, 6, 3),
    "resnet50": (3, 4, 6, 3),
    "resnet101": (3, 4, 23, 3),
    "resnet152": (3, 8, 36, 3),
}
BOTTLENECKS = ("resnet50", "resnet101", "resnet152")


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)


class ZeroPad(nn.Module):
    """Shortcut A: every stride-th pixel, and zeros for the channels that are new. No parameters."""

    def __init__(self, new_channels: int, stride: int) -> None:
        super().__init__()
        self.new_channels, self.stride = new_channels, stride

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, C, H, W] to [N, C + new_channels, ceil(H / stride), ceil(W / stride)]."""
        padded = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new_channels))
        return padded.contiguous(memory_format=torch.channels_last)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions; with a shortcut around them where there is one."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int, shortcut: nn.Module | None, residual: bool) -> None:
        super().__init__()
        self.conv1 = _conv(inputs, width, 3, stride)
        self.bn1 = BNReLU(width)
        self.conv2 = _conv(width, width, 3)
        self.bn2 = BNReLU(width)
        self.downsample = shortcut
        self.residual = residual

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, inputs, H, W] to [N, width, H / stride, W / stride]."""
        out = self.bn1(self.conv1(x))
        return self.bn2(self.conv2(out), _around(x, self.downsample) if self.residual else None)


class Bottleneck(nn.Module):
    """A 1x1 convolution to fewer channels, a 3x3, and a 1x1 back to four times as many; a shortcut around them."""

    expansion = 4

    def __init__(
        self, inputs: int, width: int, stride: int, shortcut: nn.Module | None, stride_on: BottleneckStride
    ) -> None:
        super().__init__()
        first, middle = (stride, 1) if stride_on == "1x1" else (1, stride)
        self.conv1 = _conv(inputs, width, 1, first)
        self.bn1 = BNReLU(width)
        self.conv2 = _conv(width, width, 3, middle)
        self.bn2 = BNReLU(width)
        self.conv3 = _conv(width, width * self.expansion, 1)
        self.bn3 = BNReLU(width * self.expansion)
        self.downsample = shortcut

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, inputs, H, W] to [N, 4 * width, H / stride, W / stride]."""
        out = self.bn1(self.conv1(x))
        out = self.bn2(self.conv2(out))
        return self.bn3(self.conv3(out), _around(x, self.downsample))


def _around(x: torch.Tensor, shortcut: nn.Module | None) -> torch.Tensor:
    return x if shortcut is None else shortcut(x)


class ResNet(nn.Module):
    """A plain or residual network: a stem, four stages of blocks, average pooling and a linear layer."""

    def __init__(
        self,
        name: str,
        num_classes: int,
        *,
        shortcut: Shortcut = "B",
        bottleneck_stride: BottleneckStride = "3x3",
        zero_init_gamma: bool = False,
    ) -> None:
        """Build with He initialization.

        Args:
            name: a key of DEPTHS.
            num_classes: outputs.
            shortcut: A = identity with zero padding where dimensions grow, B = projection there, C = projection in
                every block. Plain networks have none.
            bottleneck_stride: the convolution that subsamples in bottleneck blocks: "3x3" (v1.5, torchvision's) or
                "1x1" (v1, the paper's).
            zero_init_gamma: start the last BatchNorm of each block at gamma 0, so that blocks begin as identities
                (Goyal et al. 2017).

        Raises:
            UserError: an option that has no effect on this network.
        """
        super().__init__()
        self.is_plain, bottleneck = name.startswith("plain"), name in BOTTLENECKS
        if self.is_plain and (shortcut != "B" or zero_init_gamma):
            raise UserError(f"model.shortcut and model.zero_init_gamma have no effect on {name}: it has no shortcuts.")
        if bottleneck_stride != "3x3" and not bottleneck:
            raise UserError(f"model.bottleneck_stride has no effect on {name}: only {', '.join(BOTTLENECKS)} have it.")
        self.shortcut, self.bottleneck_stride = shortcut, bottleneck_stride
        block = Bottleneck if bottleneck else BasicBlock

        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = BNReLU(64)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        channels = 64
        for stage, depth in enumerate(DEPTHS[name]):
            blocks = []
            for i in range(depth):
                stride = 2 if stage > 0 and i == 0 else 1
                blocks.append(self._block(block, channels, 64 << stage, stride))
                channels = (64 << stage) * block.expansion
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)
        self._initialize(zero_init_gamma)

    def _block(self, block: type[BasicBlock] | type[Bottleneck], inputs: int, width: int, stride: int) -> nn.Module:
        outputs = width * block.expansion
        grows = inputs != outputs or stride != 1
        shortcut: nn.Module | None = None
        if self.is_plain or not (grows or self.shortcut == "C"):
            shortcut = None
        elif self.shortcut == "A":
            shortcut = ZeroPad(outputs - inputs, stride)
        else:
            shortcut = nn.Sequential(_conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))
        if block is Bottleneck:
            return Bottleneck(inputs, width, stride, shortcut, self.bottleneck_stride)
        return BasicBlock(inputs, width, stride, shortcut, residual=not self.is_plain)

    def _initialize(self, zero_init_gamma: bool) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                # He et al. 2015, "Delving Deep into Rectifiers": the variance of the gradients is kept
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif zero_init_gamma and isinstance(module, BasicBlock | Bottleneck):
                last = module.bn3 if isinstance(module, Bottleneck) else module.bn2
                nn.init.zeros_(last.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images [N, 3, H, W] to logits [N, num_classes]."""
        x = self.maxpool(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.avgpool(x).flatten(1))
