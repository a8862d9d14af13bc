"""The torch operators (torch.ops.fastflower) around the kernels.

They run as Triton kernels on CUDA and in plain torch on a CPU; where TRITON_INTERPRET=1, Triton's interpreter runs the
kernels on a CPU. Gradients are attached in `batch_norm.py`. Statistics and sums are float32 whatever the data.
"""

from __future__ import annotations

import os
from types import ModuleType

import torch
import torch.distributed as dist
from torch import Tensor

from . import plain
from .norm import Norm, Running

DEVICES = ("cpu", "cuda")


def _implementation(x: Tensor) -> ModuleType:
    if x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1":
        from . import launch  # imports Triton, which a CPU does not need

        return launch
    return plain


@torch.library.custom_op("fastflower::bn_stats", mutates_args=("running_mean", "running_var"), device_types=DEVICES)
def bn_stats(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean [C], biased variance [C] and count [1] of x [N, C, H, W]; updates the running statistics."""
    running = Running(running_mean, running_var, num_batches_tracked, momentum)
    statistics: tuple[Tensor, Tensor, Tensor] = _implementation(x).statistics(x, running)
    return statistics


@bn_stats.register_fake
def _(x, running_mean, running_var, num_batches_tracked, momentum):  # type: ignore[no-untyped-def]
    return _floats(x, x.shape[1]), _floats(x, x.shape[1]), _floats(x, 1)


@torch.library.custom_op("fastflower::bn_moments", mutates_args=(), device_types=DEVICES)
def bn_moments(x: Tensor) -> Tensor:
    """Count, mean and sum of squared deviations of x [N, C, H, W] by channel: [3, C]."""
    moments: Tensor = _implementation(x).moments(x)
    return moments


@bn_moments.register_fake
def _(x):  # type: ignore[no-untyped-def]
    return _floats(x, 3, x.shape[1])


@torch.library.custom_op("fastflower::gather_moments", mutates_args=(), device_types=DEVICES)
def gather_moments(moments: Tensor) -> Tensor:
    """The moments [3, C] of every rank of the default group: [world_size, 3, C]."""
    gathered = _floats(moments, dist.get_world_size(), *moments.shape)
    dist.all_gather_into_tensor(gathered, moments.contiguous()[None])
    return gathered


@gather_moments.register_fake
def _(moments):  # type: ignore[no-untyped-def]
    return _floats(moments, dist.get_world_size(), *moments.shape)


@torch.library.custom_op("fastflower::bn_merge", mutates_args=("running_mean", "running_var"), device_types=DEVICES)
def bn_merge(
    moments: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`bn_stats` from the moments [R, 3, C] of R parts."""
    running = Running(running_mean, running_var, num_batches_tracked, momentum)
    statistics: tuple[Tensor, Tensor, Tensor] = _implementation(moments).merge(moments.contiguous(), running)
    return statistics


@bn_merge.register_fake
def _(moments, running_mean, running_var, num_batches_tracked, momentum):  # type: ignore[no-untyped-def]
    c = moments.shape[2]
    return _floats(moments, c), _floats(moments, c), _floats(moments, 1)


@torch.library.custom_op("fastflower::bn_relu", mutates_args=(), device_types=DEVICES)
def bn_relu(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    mean_r: Tensor | None,
    var_r: Tensor | None,
    weight_r: Tensor | None,
    bias_r: Tensor | None,
    eps_r: float,
    save_mask: bool,
) -> tuple[Tensor, Tensor]:
    """relu(norm(x) + residual), the residual normalized too where mean_r is given; and its mask, or [0]."""
    norm, residual_norm = Norm(mean, var, weight, bias, eps), _norm(mean_r, var_r, weight_r, bias_r, eps_r, None)
    y, mask = _implementation(x).forward(x, norm, residual, residual_norm, save_mask=save_mask)
    return y, _bytes(x, 0) if mask is None else mask


@bn_relu.register_fake
def _(x, mean, var, weight, bias, eps, residual, mean_r, var_r, weight_r, bias_r, eps_r, save_mask):  # type: ignore[no-untyped-def]
    n, c, h, w = x.shape
    return _empty_like(x), _bytes(x, n * h * w, (c + 7) // 8) if save_mask else _bytes(x, 0)


@torch.library.custom_op("fastflower::bn_relu_backward", mutates_args=(), device_types=DEVICES)
def bn_relu_backward(
    dy: Tensor,
    dy2: Tensor | None,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    count: Tensor | None,
    residual: Tensor | None,
    mean_r: Tensor | None,
    var_r: Tensor | None,
    weight_r: Tensor | None,
    bias_r: Tensor | None,
    eps_r: float,
    count_r: Tensor | None,
    mask: Tensor | None,
    sync: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias, residual, weight_r and bias_r; [0] for what there is none of.

    dy and dy2 are the gradients of two uses of y. count and count_r are None for running statistics. residual is given
    where it was normalized, mask where it was only added. sync takes the sums over the ranks of the default group; the
    gradients of weights and biases stay the rank's own, as those of any parameter.
    """
    norm = Norm(mean, var, weight, bias, eps, count)
    residual_norm = _norm(mean_r, var_r, weight_r, bias_r, eps_r, count_r)
    kernels = _implementation(x)
    sums, parameters, through_relu = kernels.reduce_gradient(dy, dy2, x, norm, residual, residual_norm, mask)
    if sync:
        dist.all_reduce(sums)
    masked = through_relu is not None
    if masked:
        dy, dy2 = through_relu, None
    dx, dr = kernels.input_gradient(dy, dy2, x, norm, residual, residual_norm, sums, masked=masked)
    dweight, dbias, dweight_r, dbias_r = (_floats(x, 0) if gradient is None else gradient for gradient in parameters)
    if dr is None:
        dr = through_relu if masked else _floats(x, 0)
    return dx, dweight, dbias, dr, dweight_r, dbias_r


@bn_relu_backward.register_fake
def _(  # type: ignore[no-untyped-def]
    dy, dy2, x, mean, var, weight, bias, eps, count, residual, mean_r, var_r, weight_r, bias_r, eps_r, count_r, mask,
    sync,
):  # fmt: skip
    nothing = _floats(x, 0)
    dweight, dbias, dweight_r, dbias_r = (
        torch.empty_like(nothing if parameter is None else parameter) for parameter in (weight, bias, weight_r, bias_r)
    )
    dr = _floats(x, 0) if residual is None and mask is None else _empty_like(x)
    return _empty_like(x), dweight, dbias, dr, dweight_r, dbias_r


def _norm(
    mean: Tensor | None, var: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float,
    count: Tensor | None,
) -> Norm | None:  # fmt: skip
    return None if mean is None or var is None else Norm(mean, var, weight, bias, eps, count)


def _empty_like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _floats(x: Tensor, *shape: int) -> Tensor:
    return x.new_empty(shape, dtype=torch.float32)


def _bytes(x: Tensor, *shape: int) -> Tensor:
    return x.new_empty(shape, dtype=torch.uint8)
