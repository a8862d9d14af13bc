"""The Triton kernels: statistics, normalization, and the two passes of the gradient.

An activation is a row-major matrix of M rows (pixels) and C channels, as channels-last tensors lie in memory. Data is
float32, bfloat16 or float16; everything is computed in float32. A program works on a block of rows and CHANNELS
channels, tile by tile. Pointers that are None switch parts off: a residual (r), its own normalization (mean_r, ...),
weight and bias.

Every kernel normalizes by the same explicit operations, so that the backward pass finds the forward's signs again.
"""

from __future__ import annotations

import triton
import triton.language as tl

_RUNTIME = ["m", "block_rows", "blocks"]  # sizes that must not make a variant of a kernel each


@triton.jit
def _place(m, block_rows, C: tl.constexpr, CHANNELS: tl.constexpr):
    """Where the program works: block and column of channels, first row and number of rows."""
    COLUMNS: tl.constexpr = (C + CHANNELS - 1) // CHANNELS
    block = tl.program_id(0) // COLUMNS
    first = block.to(tl.int64) * block_rows
    n = tl.minimum(block_rows, m - first).to(tl.int32)
    return block, tl.program_id(0) % COLUMNS, first, n


@triton.jit
def _affine(mean_ptr, var_ptr, weight_ptr, bias_ptr, eps, channels, exists):
    """Mean, 1 / standard deviation, and what x - mean is multiplied by and added to."""
    mean = tl.load(mean_ptr + channels, mask=exists, other=0.0).to(tl.float32)
    var = tl.load(var_ptr + channels, mask=exists, other=1.0).to(tl.float32)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(var + eps))
    scale = rstd
    shift = tl.zeros_like(rstd)
    if weight_ptr is not None:
        scale = rstd * tl.load(weight_ptr + channels, mask=exists, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        shift = tl.load(bias_ptr + channels, mask=exists, other=0.0).to(tl.float32)
    return mean, rstd, scale, shift


@triton.jit
def _normalize(x, mean, scale, shift):
    return tl.fma(x - mean[None, :], scale[None, :], shift[None, :])


@triton.jit
def _load(ptr, offsets, mask):
    return tl.load(ptr + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _passes(z):
    """Where ReLU lets the gradient through: not at zero, but at NaN, as torch has it."""
    return (z <= 0.0) == 0


@triton.jit
def _pack(keep, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """[ROWS, CHANNELS] truth values to bytes [ROWS, CHANNELS / 8], the lowest bit first."""
    bits = tl.reshape(keep.to(tl.int32), (ROWS, CHANNELS // 8, 8))
    return tl.sum(bits << tl.arange(0, 8)[None, None, :], 2).to(tl.uint8)


@triton.jit
def _unpack(packed, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    bits = packed.to(tl.int32)[:, :, None] >> tl.arange(0, 8)[None, None, :]
    return tl.reshape(bits & 1, (ROWS, CHANNELS)) != 0


@triton.jit(do_not_specialize=_RUNTIME)
def partial_moments(
    x_ptr, moments_ptr, m, block_rows, C: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr
):  # fmt: skip
    """Count, mean and sum of squared deviations of each block and channel: moments [blocks, 3, C].

    Sums are taken of differences from the first tile's mean, which keeps their digits where mean >> deviation.
    """
    block, column, first, n = _place(m, block_rows, C, CHANNELS)
    rows = tl.arange(0, ROWS)
    channels = column * CHANNELS + tl.arange(0, CHANNELS)
    exists = channels < C
    offsets = rows[:, None] * C + channels[None, :]
    x_ptr += first * C
    inside = (rows[:, None] < n) & exists[None, :]
    x = _load(x_ptr, offsets, inside)
    origin = tl.sum(x, 0) / tl.minimum(n, ROWS).to(tl.float32)
    difference = tl.where(inside, x - origin[None, :], 0.0)
    sums = difference
    squares = difference * difference
    for start in range(ROWS, n, ROWS):
        x_ptr += ROWS * C
        inside = (rows[:, None] < n - start) & exists[None, :]
        difference = tl.where(inside, _load(x_ptr, offsets, inside) - origin[None, :], 0.0)
        sums += difference
        squares = tl.fma(difference, difference, squares)
    count = n.to(tl.float32)
    total = tl.sum(sums, 0)
    moments_ptr += block * 3 * C + channels
    tl.store(moments_ptr, tl.zeros_like(total) + count, mask=exists)
    tl.store(moments_ptr + C, origin + total / count, mask=exists)
    # rounding may bring a constant channel below zero; NaN stays
    m2 = tl.sum(squares, 0) - total * (total / count)
    tl.store(moments_ptr + 2 * C, tl.where(m2 < 0.0, 0.0, m2), mask=exists)


@triton.jit
def _merge(moments_ptr, blocks, channels, exists, C: tl.constexpr, BLOCKS: tl.constexpr, CHANNELS: tl.constexpr):
    """Count, mean and M2 over all blocks (Chan, Golub, LeVeque 1983): the mean first, then deviations from it."""
    index = tl.arange(0, BLOCKS)
    moments_ptr += index[:, None] * (3 * C) + channels[None, :]
    counts = tl.zeros((BLOCKS, CHANNELS), tl.float32)
    for start in range(0, blocks, BLOCKS):
        inside = (index[:, None] < blocks - start) & exists[None, :]
        counts += _load(moments_ptr, start * (3 * C), inside)
    count = tl.where(exists, tl.sum(counts, 0), 1.0)
    means = tl.zeros((BLOCKS, CHANNELS), tl.float32)
    for start in range(0, blocks, BLOCKS):
        inside = (index[:, None] < blocks - start) & exists[None, :]
        share = _load(moments_ptr, start * (3 * C), inside) / count[None, :]
        means += tl.where(inside, share * _load(moments_ptr, start * (3 * C) + C, inside), 0.0)
    mean = tl.sum(means, 0)
    m2 = tl.zeros((BLOCKS, CHANNELS), tl.float32)
    for start in range(0, blocks, BLOCKS):
        inside = (index[:, None] < blocks - start) & exists[None, :]
        block_count = _load(moments_ptr, start * (3 * C), inside)
        distance = _load(moments_ptr, start * (3 * C) + C, inside) - mean[None, :]
        block_m2 = _load(moments_ptr, start * (3 * C) + 2 * C, inside)
        m2 += tl.where(inside, tl.fma(distance * block_count, distance, block_m2), 0.0)
    return count, mean, tl.sum(m2, 0)


@triton.jit(do_not_specialize=_RUNTIME)
def merge_moments(
    moments_ptr, merged_ptr, blocks, C: tl.constexpr, BLOCKS: tl.constexpr, CHANNELS: tl.constexpr
):  # fmt: skip
    """Moments [blocks, 3, C] to [3, C]."""
    channels = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    exists = channels < C
    count, mean, m2 = _merge(moments_ptr, blocks, channels, exists, C, BLOCKS, CHANNELS)
    tl.store(merged_ptr + channels, count, mask=exists)
    tl.store(merged_ptr + C + channels, mean, mask=exists)
    tl.store(merged_ptr + 2 * C + channels, m2, mask=exists)


@triton.jit(do_not_specialize=_RUNTIME)
def finish_statistics(
    moments_ptr, mean_ptr, var_ptr, count_ptr, running_mean_ptr, running_var_ptr, num_batches_ptr, momentum, blocks,
    C: tl.constexpr, BLOCKS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Moments [blocks, 3, C] to mean, biased variance and count; the running statistics take their share.

    The share is momentum, or 1 / number of batches where num_batches_ptr is given.
    """
    channels = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    exists = channels < C
    count, mean, m2 = _merge(moments_ptr, blocks, channels, exists, C, BLOCKS, CHANNELS)
    tl.store(mean_ptr + channels, mean, mask=exists)
    tl.store(var_ptr + channels, m2 / count, mask=exists)
    tl.store(count_ptr + channels, count, mask=channels == 0)
    if running_mean_ptr is not None:
        share = momentum
        if num_batches_ptr is not None:
            share = 1.0 / tl.load(num_batches_ptr).to(tl.float32)
        old_mean = tl.load(running_mean_ptr + channels, mask=exists, other=0.0).to(tl.float32)
        old_var = tl.load(running_var_ptr + channels, mask=exists, other=0.0).to(tl.float32)
        unbiased = m2 / tl.maximum(count - 1.0, 1.0)
        tl.store(running_mean_ptr + channels, (1.0 - share) * old_mean + share * mean, mask=exists)
        tl.store(running_var_ptr + channels, (1.0 - share) * old_var + share * unbiased, mask=exists)


@triton.jit(do_not_specialize=_RUNTIME)
def normalize_relu(
    x_ptr, r_ptr, y_ptr, mask_ptr,
    mean_ptr, var_ptr, weight_ptr, bias_ptr, eps, mean_r_ptr, var_r_ptr, weight_r_ptr, bias_r_ptr, eps_r,
    m, block_rows, C: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """relu(normalized x + r) to y, with r normalized too where mean_r is given; where ReLU passes to mask, as bits."""
    BYTES: tl.constexpr = (C + 7) // 8
    _, column, first, n = _place(m, block_rows, C, CHANNELS)
    rows = tl.arange(0, ROWS)
    channels = column * CHANNELS + tl.arange(0, CHANNELS)
    exists = channels < C
    mean, _, scale, shift = _affine(mean_ptr, var_ptr, weight_ptr, bias_ptr, eps, channels, exists)
    if mean_r_ptr is not None:
        mean_r, _, scale_r, shift_r = _affine(mean_r_ptr, var_r_ptr, weight_r_ptr, bias_r_ptr, eps_r, channels, exists)
    for tile in range(tl.cdiv(n, ROWS)):
        start = tile * ROWS
        offsets = (first + start) * C + (rows[:, None] * C + channels[None, :])
        inside = (rows[:, None] < n - start) & exists[None, :]
        z = _normalize(_load(x_ptr, offsets, inside), mean, scale, shift)
        if r_ptr is not None:
            r = _load(r_ptr, offsets, inside)
            if mean_r_ptr is not None:
                r = _normalize(r, mean_r, scale_r, shift_r)
            z += r
        if mask_ptr is not None:
            bytes_ = column * (CHANNELS // 8) + tl.arange(0, CHANNELS // 8)
            tl.store(
                mask_ptr + (first + start) * BYTES + (rows[:, None] * BYTES + bytes_[None, :]),
                _pack(_passes(z), ROWS, CHANNELS),
                mask=(rows[:, None] < n - start) & (bytes_[None, :] < BYTES),
            )
        y = tl.where(z <= 0.0, 0.0, z)
        tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=_RUNTIME)
def reduce_gradient(
    dy_ptr, dy2_ptr, x_ptr, r_ptr, mask_ptr, dr_ptr, sums_ptr,
    mean_ptr, var_ptr, weight_ptr, bias_ptr, eps, mean_r_ptr, var_r_ptr, weight_r_ptr, bias_r_ptr, eps_r,
    m, block_rows, C: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Sums over each block of g, g * (x - mean) and, with r, g * (r - mean_r): sums [blocks, 2 or 3, C].

    g = dy + dy2 where ReLU passes: by mask where it is given, else found again from x and r. It is written to dr where
    that is given: the gradient of a residual that was only added.
    """
    BYTES: tl.constexpr = (C + 7) // 8
    block, column, first, n = _place(m, block_rows, C, CHANNELS)
    rows = tl.arange(0, ROWS)
    channels = column * CHANNELS + tl.arange(0, CHANNELS)
    exists = channels < C
    mean, _, scale, shift = _affine(mean_ptr, var_ptr, weight_ptr, bias_ptr, eps, channels, exists)
    if r_ptr is not None:
        mean_r, _, scale_r, shift_r = _affine(mean_r_ptr, var_r_ptr, weight_r_ptr, bias_r_ptr, eps_r, channels, exists)
        sum_gr = tl.zeros((ROWS, CHANNELS), tl.float32)
    sum_g = tl.zeros((ROWS, CHANNELS), tl.float32)
    sum_gx = tl.zeros((ROWS, CHANNELS), tl.float32)
    for start in range(0, n, ROWS):
        offsets = (first + start) * C + (rows[:, None] * C + channels[None, :])
        inside = (rows[:, None] < n - start) & exists[None, :]
        g = _load(dy_ptr, offsets, inside)
        if dy2_ptr is not None:
            g += _load(dy2_ptr, offsets, inside)
        x = _load(x_ptr, offsets, inside)
        if r_ptr is not None:
            r = _load(r_ptr, offsets, inside)
        if mask_ptr is not None:
            bytes_ = column * (CHANNELS // 8) + tl.arange(0, CHANNELS // 8)
            packed = tl.load(
                mask_ptr + (first + start) * BYTES + (rows[:, None] * BYTES + bytes_[None, :]),
                mask=(rows[:, None] < n - start) & (bytes_[None, :] < BYTES),
                other=0,
            )
            passes = _unpack(packed, ROWS, CHANNELS)
        else:
            z = _normalize(x, mean, scale, shift)
            if r_ptr is not None:
                z += _normalize(r, mean_r, scale_r, shift_r)
            passes = _passes(z)
        g = tl.where(passes, g, 0.0)
        if dr_ptr is not None:
            tl.store(dr_ptr + offsets, g.to(dr_ptr.dtype.element_ty), mask=inside)
        sum_g += g
        sum_gx = tl.fma(g, x - mean[None, :], sum_gx)
        if r_ptr is not None:
            sum_gr = tl.fma(g, r - mean_r[None, :], sum_gr)
    SUMS: tl.constexpr = 2 if r_ptr is None else 3
    sums_ptr += block * SUMS * C + channels
    tl.store(sums_ptr, tl.sum(sum_g, 0), mask=exists)
    tl.store(sums_ptr + C, tl.sum(sum_gx, 0), mask=exists)
    if r_ptr is not None:
        tl.store(sums_ptr + 2 * C, tl.sum(sum_gr, 0), mask=exists)


@triton.jit
def _column_sum(ptr, blocks, stride, channels, exists, BLOCKS: tl.constexpr, CHANNELS: tl.constexpr):
    index = tl.arange(0, BLOCKS)
    ptr += index[:, None] * stride + channels[None, :]
    total = tl.zeros((BLOCKS, CHANNELS), tl.float32)
    for start in range(0, blocks, BLOCKS):
        total += _load(ptr, start * stride, (index[:, None] < blocks - start) & exists[None, :])
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=_RUNTIME)
def finish_gradient(
    partial_ptr, sums_ptr, var_ptr, dweight_ptr, dbias_ptr, eps, var_r_ptr, dweight_r_ptr, dbias_r_ptr, eps_r, blocks,
    C: tl.constexpr, BLOCKS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Partial sums [blocks, 2 or 3, C] to sums [2 or 3, C] and to the gradients of weight and bias."""
    SUMS: tl.constexpr = 2 if var_r_ptr is None else 3
    channels = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    exists = channels < C
    g = _column_sum(partial_ptr, blocks, SUMS * C, channels, exists, BLOCKS, CHANNELS)
    gx = _column_sum(partial_ptr + C, blocks, SUMS * C, channels, exists, BLOCKS, CHANNELS)
    tl.store(sums_ptr + channels, g, mask=exists)
    tl.store(sums_ptr + C + channels, gx, mask=exists)
    _, rstd, _, _ = _affine(var_ptr, var_ptr, None, None, eps, channels, exists)
    if dweight_ptr is not None:
        tl.store(dweight_ptr + channels, (gx * rstd).to(dweight_ptr.dtype.element_ty), mask=exists)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + channels, g.to(dbias_ptr.dtype.element_ty), mask=exists)
    if var_r_ptr is not None:
        gr = _column_sum(partial_ptr + 2 * C, blocks, SUMS * C, channels, exists, BLOCKS, CHANNELS)
        tl.store(sums_ptr + 2 * C + channels, gr, mask=exists)
        _, rstd_r, _, _ = _affine(var_r_ptr, var_r_ptr, None, None, eps_r, channels, exists)
        if dweight_r_ptr is not None:
            tl.store(dweight_r_ptr + channels, (gr * rstd_r).to(dweight_r_ptr.dtype.element_ty), mask=exists)
        if dbias_r_ptr is not None:
            tl.store(dbias_r_ptr + channels, g.to(dbias_r_ptr.dtype.element_ty), mask=exists)


@triton.jit
def _corrections(sum_g_ptr, sum_gx_ptr, count_ptr, rstd, channels, exists):
    """The constants of `_correct`."""
    c1 = tl.zeros_like(rstd)
    c2 = tl.zeros_like(rstd)
    if count_ptr is not None:
        count = tl.load(count_ptr)
        c1 = tl.load(sum_g_ptr + channels, mask=exists, other=0.0) / count
        c2 = tl.load(sum_gx_ptr + channels, mask=exists, other=0.0) * rstd * rstd / count
    return c1, c2


@triton.jit
def _correct(g, x, mean, c1, c2, count_ptr):
    """The gradient less what goes through mean and variance, where they are the batch's own (they have a count)."""
    if count_ptr is not None:
        g = g - c1[None, :] - (x - mean[None, :]) * c2[None, :]
    return g


@triton.jit(do_not_specialize=_RUNTIME)
def input_gradient(
    dy_ptr, dy2_ptr, x_ptr, r_ptr, dx_ptr, dr_ptr, sums_ptr,
    mean_ptr, var_ptr, weight_ptr, bias_ptr, eps, count_ptr,
    mean_r_ptr, var_r_ptr, weight_r_ptr, bias_r_ptr, eps_r, count_r_ptr,
    m, block_rows, C: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Gradients of x and of a normalized residual r from the finished sums; MASKED: dy has been through ReLU."""
    _, column, first, n = _place(m, block_rows, C, CHANNELS)
    rows = tl.arange(0, ROWS)
    channels = column * CHANNELS + tl.arange(0, CHANNELS)
    exists = channels < C
    mean, rstd, scale, shift = _affine(mean_ptr, var_ptr, weight_ptr, bias_ptr, eps, channels, exists)
    c1, c2 = _corrections(sums_ptr, sums_ptr + C, count_ptr, rstd, channels, exists)
    if r_ptr is not None:
        mean_r, rstd_r, scale_r, shift_r = _affine(
            mean_r_ptr, var_r_ptr, weight_r_ptr, bias_r_ptr, eps_r, channels, exists
        )
        c1_r, c2_r = _corrections(sums_ptr, sums_ptr + 2 * C, count_r_ptr, rstd_r, channels, exists)
    for tile in range(tl.cdiv(n, ROWS)):
        start = tile * ROWS
        offsets = (first + start) * C + (rows[:, None] * C + channels[None, :])
        inside = (rows[:, None] < n - start) & exists[None, :]
        g = _load(dy_ptr, offsets, inside)
        if dy2_ptr is not None:
            g += _load(dy2_ptr, offsets, inside)
        x = _load(x_ptr, offsets, inside)
        if r_ptr is not None:
            r = _load(r_ptr, offsets, inside)
        if not MASKED:
            z = _normalize(x, mean, scale, shift)
            if r_ptr is not None:
                z += _normalize(r, mean_r, scale_r, shift_r)
            g = tl.where(_passes(z), g, 0.0)
        dx = scale[None, :] * _correct(g, x, mean, c1, c2, count_ptr)
        tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        if r_ptr is not None:
            dr = scale_r[None, :] * _correct(g, r, mean_r, c1_r, c2_r, count_r_ptr)
            tl.store(dr_ptr + offsets, dr.to(dr_ptr.dtype.element_ty), mask=inside)
