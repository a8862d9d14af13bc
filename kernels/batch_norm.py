"""relu(batch_norm(x) + residual) as one differentiable operation with BatchNorm2d's semantics."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import ops

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Statistics(NamedTuple):
    """Mean [C] and variance [C], and over how many values [1] they were taken; None for running statistics."""

    mean: Tensor
    var: Tensor
    batch_count: Tensor | None


def bn_relu(
    x: Tensor,
    norm: nn.BatchNorm2d,
    residual: Tensor | None = None,
    residual_norm: nn.BatchNorm2d | None = None,
    *,
    sync: bool = False,
    fork: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """relu(norm(x) + residual), or relu(norm(x) + residual_norm(residual)), in x's type and channels-last.

    The modules supply parameters, running statistics (which are updated) and settings; their own forward is not called.

    Args:
        x: [N, C, H, W] in float32, bfloat16 or float16; channels-last, or it is copied.
        norm: normalizes x.
        residual: what is added, of x's shape.
        residual_norm: normalizes the residual.
        sync: take the batch's statistics over all ranks of torch.distributed's default group.
        fork: return the output twice, once for each consumer, so that both gradients arrive apart and need no pass of
            their own to be added.

    Raises:
        TypeError: another type of data.
        ValueError: shapes do not fit, or the batch has one value a channel.
        RuntimeError: sync without an initialized process group.
    """
    _check(x, norm)
    if residual is not None:
        if residual.shape != x.shape:
            raise ValueError(f"the residual is {tuple(residual.shape)}, which differs from x, {tuple(x.shape)}")
        _check(residual, residual_norm or norm)
        residual = residual.to(x.dtype)
    elif residual_norm is not None:
        raise ValueError("residual_norm was given without a residual")
    normalized = [(x, norm)] if residual is None or residual_norm is None else [(x, norm), (residual, residual_norm)]
    statistics = _statistics(normalized, sync)
    gradients = torch.is_grad_enabled()
    outputs: Tensor | tuple[Tensor, Tensor] = _BNReLU.apply(
        x, norm.weight, norm.bias, *statistics[0], norm.eps,
        residual, *_parameters(residual_norm), *(statistics[1] if residual_norm else (None, None, None)),
        residual_norm.eps if residual_norm else 0.0,
        gradients and residual is not None and residual_norm is None, sync, fork,
    )  # fmt: skip
    return outputs


class _BNReLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, count: Tensor | None,
        eps: float,
        residual: Tensor | None, weight_r: Tensor | None, bias_r: Tensor | None, mean_r: Tensor | None,
        var_r: Tensor | None, count_r: Tensor | None, eps_r: float,
        save_mask: bool, sync: bool, fork: bool,
    ) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
        y, mask = ops.bn_relu(
            x, mean, var, weight, bias, eps, residual, mean_r, var_r, weight_r, bias_r, eps_r, save_mask
        )
        ctx.save_for_backward(
            x, mean, var, weight, bias, count, None if mean_r is None else residual, mean_r, var_r, weight_r, bias_r,
            count_r, mask if save_mask else None,
        )  # fmt: skip
        ctx.eps, ctx.eps_r = eps, eps_r
        ctx.sync = sync and (count is not None or count_r is not None)
        ctx.set_materialize_grads(False)
        return (y, y.view_as(y)) if fork else y

    @staticmethod
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        given = [dy for dy in dys if dy is not None]
        if not given:
            return (None,) * 17
        x, mean, var, weight, bias, count, residual, mean_r, var_r, weight_r, bias_r, count_r, mask = ctx.saved_tensors
        dx, dweight, dbias, dr, dweight_r, dbias_r = ops.bn_relu_backward(
            given[0], given[1] if len(given) == 2 else None, x, mean, var, weight, bias, ctx.eps, count,
            residual, mean_r, var_r, weight_r, bias_r, ctx.eps_r, count_r, mask, ctx.sync,
        )  # fmt: skip
        has_residual = residual is not None or mask is not None
        return (
            dx, None if weight is None else dweight, None if bias is None else dbias, None, None, None, None,
            dr if has_residual else None, None if weight_r is None else dweight_r, None if bias_r is None else dbias_r,
            None, None, None, None, None, None, None,
        )  # fmt: skip


def _refuse_second_derivative(ctx: Any, *gradients: Tensor | None) -> None:
    raise RuntimeError("bn_relu cannot be differentiated twice: use norm='torch' for second derivatives")


ops.bn_relu_backward.register_autograd(_refuse_second_derivative)


def _check(x: Tensor, norm: nn.BatchNorm2d) -> None:
    norm._check_input_dim(x)
    if x.dtype not in DTYPES:
        raise TypeError(f"bn_relu takes float32, bfloat16 and float16, not {x.dtype}")
    if x.shape[1] != norm.num_features:
        raise ValueError(f"the input has {x.shape[1]} channels, the normalization {norm.num_features}")


def _parameters(norm: nn.BatchNorm2d | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if norm is None else (norm.weight, norm.bias)


def _statistics(normalized: list[tuple[Tensor, nn.BatchNorm2d]], sync: bool) -> list[Statistics]:
    """The statistics by which each input is normalized; the batch's own also enter the running ones.

    Over ranks, those of all inputs travel together: one exchange is faster than two, and cannot come in another order
    on another rank.
    """
    running: list[Statistics | None] = [None if _uses_batch(norm) else _running(norm) for _, norm in normalized]
    batch = [(x.detach(), norm) for (x, norm), kept in zip(normalized, running, strict=True) if kept is None]
    if not batch:
        return [kept for kept in running if kept is not None]
    if sync:
        if not dist.is_initialized():
            raise RuntimeError("sync needs torch.distributed's default process group, which is not initialized")
        moments = ops.gather_moments(torch.cat([ops.bn_moments(x) for x, _ in batch], dim=1))
        parts = moments.split([x.shape[1] for x, _ in batch], dim=2)
        computed = [
            Statistics(*ops.bn_merge(part, *_tracked(norm))) for part, (_, norm) in zip(parts, batch, strict=True)
        ]
    else:
        for x, _ in batch:
            if x.numel() == x.shape[1]:
                raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.shape}")
        computed = [Statistics(*ops.bn_stats(x, *_tracked(norm))) for x, norm in batch]
    return [computed.pop(0) if kept is None else kept for kept in running]


def _uses_batch(norm: nn.BatchNorm2d) -> bool:
    return norm.training or norm.running_mean is None


def _running(norm: nn.BatchNorm2d) -> Statistics:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return Statistics(norm.running_mean, norm.running_var, None)


def _tracked(norm: nn.BatchNorm2d) -> tuple[Tensor | None, Tensor | None, Tensor | None, float | None]:
    """The running statistics that this batch enters, if any, and how; counts the batch."""
    if not (norm.training and norm.track_running_stats and norm.running_mean is not None):
        return None, None, None, 0.0
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    return norm.running_mean, norm.running_var, norm.num_batches_tracked, norm.momentum
