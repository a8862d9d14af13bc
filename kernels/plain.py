"""The operations in plain torch, for a CPU: the simplest form of what the Triton kernels compute.

Computed in float32 on matrices of M = N * H * W rows and C channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .norm import Norm, Running


def moments(x: Tensor) -> Tensor:
    """Count, mean and sum of squared deviations (M2) of [N, C, H, W] by channel: [3, C]."""
    rows = _rows(x)
    var, mean = torch.var_mean(rows, 0, correction=0)
    count = torch.full_like(mean, len(rows))
    return torch.stack((count, mean, var * count))


def statistics(x: Tensor, running: Running) -> tuple[Tensor, Tensor, Tensor]:
    """Mean [C], biased variance [C] and count [1] of [N, C, H, W]; the running statistics take their share.

    The running variance takes the unbiased one.
    """
    return merge(moments(x)[None], running)


def merge(partial: Tensor, running: Running) -> tuple[Tensor, Tensor, Tensor]:
    """The same from the moments [R, 3, C] of R parts, by Chan, Golub and LeVeque's formula (1983)."""
    counts, means, m2s = partial.unbind(1)
    count = counts.sum(0)
    mean = (counts / count * means).sum(0)
    m2 = (m2s + counts * (means - mean).square()).sum(0)
    if running.mean is not None and running.var is not None:
        share = _share(running)
        running.mean.lerp_(mean.to(running.mean.dtype), share.to(running.mean.dtype))
        running.var.lerp_((m2 / (count - 1).clamp(min=1)).to(running.var.dtype), share.to(running.var.dtype))
    return mean, m2 / count, count[:1].clone()


def forward(
    x: Tensor, norm: Norm, residual: Tensor | None, residual_norm: Norm | None, *, save_mask: bool
) -> tuple[Tensor, Tensor | None]:
    """relu(norm(x) + residual) [N, C, H, W], the residual normalized too where residual_norm is given.

    With save_mask also where ReLU lets the gradient pass, one bit an element, the lowest first: bytes
    [N * H * W, ceil(C / 8)].
    """
    z = _pre_activation(x, norm, residual, residual_norm)
    mask = _pack(_passes(z)) if save_mask else None
    return _like(x, z.relu_()), mask


def reduce_gradient(
    dy: Tensor, dy2: Tensor | None, x: Tensor, norm: Norm, residual: Tensor | None, residual_norm: Norm | None,
    mask: Tensor | None,
) -> tuple[Tensor, tuple[Tensor | None, ...], Tensor | None]:  # fmt: skip
    """The first pass of the gradient, over g = dy + dy2 where ReLU passes.

    Args:
        dy: gradient of y.
        dy2: gradient of its second use, or None.
        x: as forward took it.
        norm: as forward took it.
        residual: only one that is normalized.
        residual_norm: its normalization.
        mask: of forward, where a residual was only added; otherwise it is found again.

    Returns:
        sums over rows of g, g * (x - mean) and, of a normalized residual, g * (residual - mean), [2 or 3, C];
        gradients of norm's weight and bias and of residual_norm's, None where there is none;
        with a mask, g, which is the residual's gradient.
    """
    g = _rows(dy) if dy2 is None else _rows(dy) + _rows(dy2)
    passes = _passes(_pre_activation(x, norm, residual, residual_norm)) if mask is None else _unpack(mask, x.shape[1])
    g = torch.where(passes, g, 0.0)
    sums = [g.sum(0), (g * (_rows(x) - norm.mean)).sum(0)]
    gradients: tuple[Tensor | None, ...] = _parameter_gradients(norm, sums[0], sums[1])
    if residual is not None and residual_norm is not None:
        sums.append((g * (_rows(residual) - residual_norm.mean)).sum(0))
        gradients += _parameter_gradients(residual_norm, sums[0], sums[2])
    else:
        gradients += (None, None)
    return torch.stack(sums), gradients, None if mask is None else _like(x, g)


def input_gradient(
    dy: Tensor, dy2: Tensor | None, x: Tensor, norm: Norm, residual: Tensor | None, residual_norm: Norm | None,
    sums: Tensor, *, masked: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The second pass: dx and, of a normalized residual, its gradient. masked: dy has been through ReLU already."""
    g = _rows(dy) if dy2 is None else _rows(dy) + _rows(dy2)
    if not masked:
        g = torch.where(_passes(_pre_activation(x, norm, residual, residual_norm)), g, 0.0)
    dx = _through_norm(g, x, norm, sums[0], sums[1])
    if residual is None or residual_norm is None:
        return dx, None
    return dx, _through_norm(g, residual, residual_norm, sums[0], sums[2])


def _share(running: Running) -> Tensor:
    if running.momentum is None and running.num_batches_tracked is not None:
        return 1 / running.num_batches_tracked.float()
    return torch.tensor(running.momentum or 0.0)


def _rows(x: Tensor) -> Tensor:
    x = x.contiguous(memory_format=torch.channels_last)
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1]).float()


def _like(x: Tensor, rows: Tensor) -> Tensor:
    """[M, C] as channels-last [N, C, H, W] of x's type."""
    result = torch.empty_like(x, memory_format=torch.channels_last)  # no view of the rows, or nobody may write into it
    result.permute(0, 2, 3, 1).view(rows.shape).copy_(rows)
    return result


def _rstd(norm: Norm) -> Tensor:
    return (norm.var.float() + norm.eps).rsqrt()


def _scale(norm: Norm) -> Tensor:
    return _rstd(norm) if norm.weight is None else _rstd(norm) * norm.weight.float()


def _normalized(x: Tensor, norm: Norm) -> Tensor:
    centered = _rows(x) - norm.mean
    return centered.mul_(_scale(norm)) if norm.bias is None else centered.mul_(_scale(norm)).add_(norm.bias)


def _pre_activation(x: Tensor, norm: Norm, residual: Tensor | None, residual_norm: Norm | None) -> Tensor:
    z = _normalized(x, norm)
    if residual is not None:
        z += _rows(residual) if residual_norm is None else _normalized(residual, residual_norm)
    return z


def _passes(z: Tensor) -> Tensor:
    """Not at zero, but at NaN, as torch's ReLU."""
    return ~(z <= 0)


def _pack(passes: Tensor) -> Tensor:
    m, c = passes.shape
    bits = F.pad(passes.to(torch.uint8), (0, -c % 8)).view(m, -(-c // 8), 8)
    return (bits << torch.arange(8, dtype=torch.uint8)).sum(2, dtype=torch.uint8)


def _unpack(mask: Tensor, c: int) -> Tensor:
    bits = (mask[:, :, None] >> torch.arange(8, dtype=torch.uint8)) & 1
    return bits.view(len(mask), 8 * mask.shape[1])[:, :c].bool()


def _parameter_gradients(norm: Norm, sum_g: Tensor, sum_gx: Tensor) -> tuple[Tensor | None, Tensor | None]:
    dweight = None if norm.weight is None else (sum_gx * _rstd(norm)).to(norm.weight.dtype)
    return dweight, None if norm.bias is None else sum_g.to(norm.bias.dtype, copy=True)


def _through_norm(g: Tensor, x: Tensor, norm: Norm, sum_g: Tensor, sum_gx: Tensor) -> Tensor:
    if norm.batch_count is not None:
        through_var = sum_gx * _rstd(norm).square() / norm.batch_count
        g = g - sum_g / norm.batch_count - (_rows(x) - norm.mean) * through_var
    return _like(x, g * _scale(norm))
