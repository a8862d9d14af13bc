"""Resize, crop, flip and normalize on a CPU: only what is kept is computed, by code that is compiled when first used.

Geometry and filter are those of the DALI graph (`fastflower.data.pipeline`), which is several times slower on a CPU: a
triangle that is widened where pictures shrink. Levels of pixels are within one of DALI's and PIL's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from typing import NamedTuple

import numpy as np
from numba import njit

from fastflower.data.memory import Memory
from fastflower.data.pipeline import Normalization, View
from fastflower.data.sampler import Request

AT_ONCE = 8  # pictures of a task for a thread: few enough to spread a batch, and so many that tasks cost nothing


class Region(NamedTuple):
    """What is there of a decoded picture."""

    pixels: np.ndarray  # uint8 RGB [h, w, 3]
    corner: tuple[int, int]  # row and column of the picture where they begin
    shape: tuple[int, int]  # height and width of the picture


class Frame(NamedTuple):
    """A picture's size after resizing and the part of it that is kept; in pixels."""

    height: int
    width: int
    top: int
    left: int
    rows: int
    columns: int


def frame(shape: Sequence[int], shorter: int, crop_yx: np.ndarray, view: View) -> Frame:
    """What becomes of a picture of `shape` (height, width); see `Request` for the other numbers."""
    height, width = shape
    shortest = min(height, width)
    target = shorter if view.resize else max(shortest, view.crop)
    height, width = height * target // shortest, width * target // shortest
    if view.place == "whole":
        return Frame(height, width, 0, 0, height, width)
    top, left = (_start(size - view.crop, share, view) for size, share in zip((height, width), crop_yx, strict=True))
    return Frame(height, width, top, left, view.crop, view.crop)


def _start(free: int, share: np.float32, view: View) -> int:
    """Where the crop begins, of `free` + 1 places."""
    if view.place == "random":
        return min(int(np.floor(share * np.float32(free + 1))), free)
    return (free + free // 2 % 2) // 2  # half of it, a half rounded to the even number


class Resampler:
    """Makes pictures of one view and normalization."""

    def __init__(self, view: View, normalization: Normalization | None) -> None:
        """Pictures are float32 with a normalization, else uint8 and without color shifts."""
        self.view, self.normalization = view, normalization
        self._memory = Memory()
        self._dtype: type[np.generic] = np.float32 if normalization else np.uint8
        self._mean, self._std = np.zeros(3, np.float32), np.ones(3, np.float32)
        if normalization:
            self._mean = np.float32(255) * np.array(normalization.mean, np.float32)
            self._std = np.float32(255) * np.array(normalization.std, np.float32)

    def batches(
        self, regions: Sequence[Region], request: Request, threads: Executor
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Resize, crop, flip and normalize pictures as a request says.

        Args:
            regions: of each picture, at least what the view keeps of it.
            request: the numbers for each.
            threads: for the work.

        Yields:
            [n, h, w, 3] and which of the pictures they are, [n] int64; one pair for each shape that comes out.
        """
        frames = [
            frame(region.shape, shorter, crop_yx, self.view)
            for region, shorter, crop_yx in zip(regions, request.shorter.tolist(), request.crop_yx, strict=True)
        ]
        flips = request.mirror.astype(bool) & (self.view.place != "whole")
        means: np.ndarray = np.repeat(self._mean[None], len(frames), axis=0)
        if self.normalization and request.shift is not None:
            means = means - np.float32(255) * request.shift
        shapes = np.array([(each.rows, each.columns) for each in frames])
        for shape in np.unique(shapes, axis=0):
            alike = np.flatnonzero((shapes == shape).all(axis=1))
            images = self._memory.take((len(alike), *shape.tolist(), 3), self._dtype)

            def work(start: int, alike: np.ndarray = alike, images: np.ndarray = images) -> None:
                for i, out in zip(alike[start : start + AT_ONCE].tolist(), images[start:], strict=False):
                    pixels, corner, shape = regions[i]
                    resample(pixels, corner, shape, frames[i], flips[i], means[i], self._std, out)

            for _ in threads.map(work, range(0, len(alike), AT_ONCE)):
                pass
            yield images, alike


@njit(nogil=True, cache=True)
def resample(pixels, corner, shape, frame, flip, mean, std, out):  # type: ignore[no-untyped-def]
    """Write a part of a resized picture.

    The axis along which there is less to do comes first: rows, where they become fewer.

    Args:
        pixels: uint8 [h, w, 3], a region of the picture.
        corner: row and column where it begins.
        shape: height and width of the picture.
        frame: a `Frame`.
        flip: left to right.
        mean: float32 [3], subtracted from the rounded levels.
        std: float32 [3], that they are divided by then.
        out: [rows, columns, 3], uint8 or float32.

    Raises:
        ValueError: the region is too small.
    """
    top, bottom, first_row, row_weights = _taps(shape[0], frame.height, frame.top, frame.rows)
    left, right, first_column, column_weights = _taps(shape[1], frame.width, frame.left, frame.columns)
    top, bottom, left, right = top - corner[0], bottom - corner[0], left - corner[1], right - corner[1]
    if min(top, left) < 0 or bottom > pixels.shape[0] or right > pixels.shape[1]:
        raise ValueError("the region lacks pixels of the frame")  # compiled code would read whatever lies there
    if flip:
        first_column, column_weights = first_column[::-1].copy(), column_weights[:, ::-1].copy()
    source = pixels.reshape(pixels.shape[0], pixels.shape[1] * 3)[top:bottom, 3 * left : 3 * right]
    line = np.zeros(source.shape[1] + 3 * len(column_weights), np.float32)  # taps of no weight may overhang
    resized = np.empty(frame.columns * 3, np.float32)
    means, stds = np.empty_like(resized), np.empty_like(resized)
    for channel in range(3):
        means[channel::3], stds[channel::3] = mean[channel], std[channel]
    if frame.height > shape[0]:
        lines = np.empty((len(source), len(resized)), np.float32)
        for row in range(len(source)):
            for i in range(source.shape[1]):
                line[i] = source[row, i]
            _resize_row(line, first_column, column_weights, lines[row])
        for row in range(frame.rows):
            _mix_rows(lines, first_row[row], row_weights[:, row], resized)
            _normalize(resized, means, stds, out[row])
    else:
        for row in range(frame.rows):
            _mix_rows(source, first_row[row], row_weights[:, row], line)
            _resize_row(line, first_column, column_weights, resized)
            _normalize(resized, means, stds, out[row])


@njit(nogil=True, cache=True)
def _mix_rows(rows, first, weights, line):  # type: ignore[no-untyped-def]
    """Weighted sum of rows from the first on, into `line`."""
    row = rows[first]
    for i in range(len(row)):
        line[i] = weights[0] * row[i]
    for tap in range(1, len(weights)):
        weight = weights[tap]
        if weight != 0:
            row = rows[first + tap]
            for i in range(len(row)):
                line[i] += weight * row[i]


@njit(nogil=True, cache=True)
def _resize_row(line, first, weights, resized):  # type: ignore[no-untyped-def]
    """Weighted sums of neighboring pixels of `line`; two taps at once, which halves the passes over `resized`."""
    for tap in range(0, len(weights), 2):
        one, other = weights[tap], weights[tap + 1]
        for column in range(len(first)):
            a, b, i, to = one[column], other[column], 3 * (first[column] + tap), 3 * column
            red = a * line[i] + b * line[i + 3]
            green = a * line[i + 1] + b * line[i + 4]
            blue = a * line[i + 2] + b * line[i + 5]
            if tap == 0:
                resized[to], resized[to + 1], resized[to + 2] = red, green, blue
            else:
                resized[to] += red
                resized[to + 1] += green
                resized[to + 2] += blue


@njit(nogil=True, cache=True, error_model="numpy")  # Python's looks for zeros, one by one
def _normalize(levels, means, stds, out):  # type: ignore[no-untyped-def]
    """Rounded levels, less their means, by their deviations: all [columns * 3], but `out` is [columns, 3]."""
    values = out.reshape(out.size)
    for i in range(len(levels)):
        values[i] = (np.float32(np.int32(levels[i] + np.float32(0.5))) - means[i]) / stds[i]


@njit(nogil=True, cache=True)
def _taps(size, resized, start, count):  # type: ignore[no-untyped-def]
    """What `count` pixels from `start` on, of an axis that is resized from `size` pixels, are made of.

    Returns:
        first pixel that is used at all, end of those that are, first for each counted from there ([count]), and weights
        from each first on ([taps, count]; taps are even in number, the last may have no weight).
    """
    scale = size / resized
    support = max(scale, 1.0)
    first, used = np.empty(count, np.int64), 0
    weights = np.zeros((int(2 * support) + 3, count), np.float32)
    for i in range(count):
        center = (start + i + 0.5) * scale
        low, high = int(np.floor(center - support + 0.5)), int(np.floor(center + support + 0.5))
        first[i] = min(max(low, 0), size - 1)
        total = 0.0
        for k in range(low, high):
            weight = max(1 - abs(k + 0.5 - center) / support, 0.0)
            tap = min(max(k, 0), size - 1) - first[i]  # beyond the border is what is at the border, as DALI has it
            weights[tap, i] += weight
            total += weight
            used = max(used, tap + 1)
        weights[:, i] /= total
    begin, end = first[0], min(first[-1] + used, size)
    return begin, end, first - begin, weights[: used + used % 2].copy()
