"""What a network learns from: cross entropy, its class weights, mixup and cutmix."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from fastflower.arrays import Ints
from fastflower.data.sampler import generator

if TYPE_CHECKING:
    from fastflower.config import TrainConfig


@dataclass(frozen=True)
class Targets:
    """Classes of a batch, each picture's own or a mixture of two."""

    labels: torch.Tensor  # [N] int64; of a mixture, the class with the larger share
    others: torch.Tensor | None = None  # [N] int64, the second class
    share: float = 1.0  # of `labels`

    def split(self, pieces: int) -> Iterator[Targets]:
        """So many parts, as torch.tensor_split makes them."""
        labels = self.labels.tensor_split(pieces)
        others = self.others.tensor_split(pieces) if self.others is not None else [None] * pieces
        for mine, other in zip(labels, others, strict=True):
            yield Targets(mine, other, self.share)


@dataclass(frozen=True)
class Criterion:
    """Cross entropy with label smoothing and class weights."""

    label_smoothing: float = 0.0
    class_weights: torch.Tensor | None = None  # [C], 1 on average over the training records

    def __call__(self, logits: torch.Tensor, targets: Targets) -> torch.Tensor:
        """Mean over the pictures, [], of logits [N, C]."""
        loss = self._mean(logits, targets.labels)
        if targets.others is None:
            return loss
        return targets.share * loss + (1 - targets.share) * self._mean(logits, targets.others)

    def _mean(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if self.class_weights is None:
            return F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        # torch's weighted mean divides by the batch's weights, which would depend on who is in it
        return F.cross_entropy(
            logits, labels, self.class_weights, label_smoothing=self.label_smoothing, reduction="none"
        ).mean()


def power_weights(labels: Ints, classes: int, power: float) -> torch.Tensor:
    """Weights [classes] float32 in proportion to size**-power of each class, 1 on average over `labels` [n]."""
    sizes = np.bincount(labels, minlength=classes)
    mass = (sizes[sizes > 0] ** (1 - power)).sum()
    weights = len(labels) / (mass * np.maximum(sizes, 1) ** power)
    return torch.from_numpy(weights.astype(np.float32))


def mix(
    images: torch.Tensor, labels: torch.Tensor, train: TrainConfig, *, seed: int, epoch: int, position: int
) -> tuple[torch.Tensor, Targets]:
    """Mix each picture with its neighbor in the batch by mixup or cutmix, where they are on; one share for the batch.

    Mixup (Zhang et al. 2018) blends the pictures; cutmix (Yun et al. 2019) replaces a rectangle. The choice, the share
    and the rectangle are functions of (seed, epoch, position) alone.

    Args:
        images: [N, 3, S, S]; cutmix writes into it.
        labels: [N] int64.
        train: settings.
        seed: of the run.
        epoch: from 0.
        position: pictures of the epoch that are done, over all ranks.
    """
    if not (train.mixup or train.cutmix) or len(labels) < 2:
        return images, Targets(labels)
    random = generator(seed=seed, epoch=epoch, position=position)
    cut = bool(train.cutmix) and (not train.mixup or random.random() < 0.5)
    alpha = train.cutmix if cut else train.mixup
    share = float(random.beta(alpha, alpha))
    others = labels.roll(1)
    if cut:
        top, bottom, left, right = _rectangle(random, 1 - share, images.shape[2])
        cutting = images[:, :, top:bottom, left:right]
        cutting.copy_(_neighbors(cutting))
        share = 1 - (bottom - top) * (right - left) / images.shape[2] ** 2
    else:
        images = _neighbors(images).lerp_(images, share)
    if share < 0.5:
        labels, others, share = others, labels, 1 - share
    return images, Targets(labels, others, share)


def _neighbors(images: torch.Tensor) -> torch.Tensor:
    """A copy of images [N, 3, H, W], each in the place of the next one, in the same memory layout.

    On a GPU torch.roll gives the contiguous layout whatever it is given, which would cost a change of layout and a
    second compilation in each step.
    """
    return torch.cat((images[-1:], images[:-1]))


def _rectangle(random: np.random.Generator, area: float, side: int) -> tuple[int, int, int, int]:
    """Top, bottom, left, right of a square of `area` (share of side²) around a random center, cut off at the edges."""
    half = math.sqrt(area) * side / 2
    y, x = random.random(2) * side
    return tuple(round(min(max(edge, 0), side)) for edge in (y - half, y + half, x - half, x + half))
