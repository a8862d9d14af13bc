"""What a normalization consists of when its statistics are known."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Norm(NamedTuple):
    """(x - mean) / sqrt(var + eps) * weight + bias by channel; all tensors are [C].

    batch_count [1] tells over how many values of x mean and var were taken; None where they are running statistics,
    through which no gradient flows.
    """

    mean: Tensor
    var: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    batch_count: Tensor | None = None


class Running(NamedTuple):
    """Running statistics [C]; a batch's enter by momentum, or by 1 / num_batches_tracked where that is None."""

    mean: Tensor | None
    var: Tensor | None
    num_batches_tracked: Tensor | None
    momentum: float | None
