"""Launches the Triton kernels. `plain.py` has the same functions in plain torch, and says what they compute."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
from torch import Tensor

from . import triton_bn
from .norm import Norm, Running
from .tiles import Grid, Tiles, choose_tiles, make_grid

MERGED_CHANNELS = 8  # of a program that merges blocks: one 32-byte sector a row
MERGED_BLOCKS = 512  # that it reads at once


def moments(x: Tensor) -> Tensor:
    """Count, mean and M2 of [N, C, H, W] by channel: [3, C]."""
    with _device(x):
        partial = _partial_moments(x)
        blocks, _, c = partial.shape
        merged = _floats(x, 3, c)
        triton_bn.merge_moments[_columns(c)](partial, merged, blocks, **_merging(c, blocks))
    return merged


def statistics(x: Tensor, running: Running) -> tuple[Tensor, Tensor, Tensor]:
    """Mean [C], variance [C] and count [1] of [N, C, H, W]; updates the running statistics."""
    with _device(x):
        return merge(_partial_moments(x), running)


def merge(partial: Tensor, running: Running) -> tuple[Tensor, Tensor, Tensor]:
    """The same from the moments [R, 3, C] of R parts."""
    blocks, _, c = partial.shape
    mean, var, count = _floats(partial, c), _floats(partial, c), _floats(partial, 1)
    cumulative = running.num_batches_tracked if running.momentum is None else None
    with _device(partial):
        triton_bn.finish_statistics[_columns(c)](
            partial, mean, var, count, running.mean, running.var, cumulative, running.momentum or 0.0, blocks,
            **_merging(c, blocks),
        )  # fmt: skip
    return mean, var, count


def forward(
    x: Tensor, norm: Norm, residual: Tensor | None, residual_norm: Norm | None, *, save_mask: bool
) -> tuple[Tensor, Tensor | None]:
    """relu(norm(x) + residual) [N, C, H, W] and, if asked for, its mask [N * H * W, ceil(C / 8)]."""
    x, residual = _channels_last(x), _optional_channels_last(residual)
    y = _empty_like(x)
    m, c = _matrix(x)
    mask = torch.empty(m, -(-c // 8), dtype=torch.uint8, device=x.device) if save_mask else None
    tiles, grid = _plan(x)
    with _device(x):
        triton_bn.normalize_relu[(grid.programs,)](
            x, residual, y, mask, *_pointers(norm), *_pointers(residual_norm), m, grid.block_rows,
            **_constants(c, tiles),
        )  # fmt: skip
    return y, mask


def reduce_gradient(
    dy: Tensor, dy2: Tensor | None, x: Tensor, norm: Norm, residual: Tensor | None, residual_norm: Norm | None,
    mask: Tensor | None,
) -> tuple[Tensor, tuple[Tensor | None, ...], Tensor | None]:  # fmt: skip
    """Sums [2 or 3, C]; gradients of both norms' weight and bias; with a mask, dy + dy2 through ReLU."""
    dy, dy2, x = _channels_last(dy), _optional_channels_last(dy2), _channels_last(x)
    m, c = _matrix(x)
    tiles, grid = _plan(x)
    through_relu = _empty_like(x) if mask is not None else None
    partial = _floats(x, grid.blocks, 2 if residual is None else 3, c)
    sums = _floats(x, *partial.shape[1:])
    dweight, dbias = _parameters_like(norm)
    dweight_r, dbias_r = _parameters_like(residual_norm)
    with _device(x):
        triton_bn.reduce_gradient[(grid.programs,)](
            dy, dy2, x, _optional_channels_last(residual), mask, through_relu, partial,
            *_pointers(norm), *_pointers(residual_norm), m, grid.block_rows, **_constants(c, tiles),
        )  # fmt: skip
        triton_bn.finish_gradient[_columns(c)](
            partial, sums, norm.var, dweight, dbias, norm.eps,
            residual_norm and residual_norm.var, dweight_r, dbias_r, residual_norm.eps if residual_norm else 0.0,
            grid.blocks, **_merging(c, grid.blocks),
        )  # fmt: skip
    return sums, (dweight, dbias, dweight_r, dbias_r), through_relu


def input_gradient(
    dy: Tensor, dy2: Tensor | None, x: Tensor, norm: Norm, residual: Tensor | None, residual_norm: Norm | None,
    sums: Tensor, *, masked: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Gradients of x and of a normalized residual; masked says that dy has been through ReLU already."""
    dy, dy2, x = _channels_last(dy), _optional_channels_last(dy2), _channels_last(x)
    m, c = _matrix(x)
    tiles, grid = _plan(x)
    dx = _empty_like(x)
    dr = None if residual is None else _empty_like(x)
    with _device(x):
        triton_bn.input_gradient[(grid.programs,)](
            dy, dy2, x, _optional_channels_last(residual), dx, dr, sums,
            *_pointers(norm), norm.batch_count, *_pointers(residual_norm), residual_norm and residual_norm.batch_count,
            m, grid.block_rows, **_constants(c, tiles), MASKED=masked,
        )  # fmt: skip
    return dx, dr


def _partial_moments(x: Tensor) -> Tensor:
    x = _channels_last(x)
    m, c = _matrix(x)
    tiles, grid = _plan(x)
    partial = _floats(x, grid.blocks, 3, c)
    triton_bn.partial_moments[(grid.programs,)](x, partial, m, grid.block_rows, **_constants(c, tiles))
    return partial


def _matrix(x: Tensor) -> tuple[int, int]:
    n, c, h, w = x.shape
    return n * h * w, c


def _plan(x: Tensor) -> tuple[Tiles, Grid]:
    tiles = choose_tiles(*_matrix(x), x.dtype)
    return tiles, make_grid(*_matrix(x), tiles)


def _constants(c: int, tiles: Tiles) -> dict[str, Any]:
    return {"C": c, "ROWS": tiles.rows, "CHANNELS": tiles.channels, "num_warps": tiles.warps}


def _columns(c: int) -> tuple[int]:
    return (triton.cdiv(c, MERGED_CHANNELS),)


def _merging(c: int, blocks: int) -> dict[str, int]:
    return {"C": c, "BLOCKS": min(MERGED_BLOCKS, triton.next_power_of_2(blocks)), "CHANNELS": MERGED_CHANNELS}


def _pointers(norm: Norm | None) -> tuple[Any, ...]:
    return (None, None, None, None, 0.0) if norm is None else norm[:5]


def _parameters_like(norm: Norm | None) -> tuple[Tensor | None, Tensor | None]:
    weight, bias = (None, None) if norm is None else (norm.weight, norm.bias)
    return None if weight is None else torch.empty_like(weight), None if bias is None else torch.empty_like(bias)


def _floats(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def _empty_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _optional_channels_last(x: Tensor | None) -> Tensor | None:
    return None if x is None else _channels_last(x)


def _device(x: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
