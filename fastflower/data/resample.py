"""Resize, crop and flip on a CPU: only what is kept is computed, by code that is compiled when it is first used.

Geometry and filter are those of the DALI graph (`fastflower.data.pipeline`), which is several times slower on a CPU: a
triangle that is widened where pictures shrink. The pixels are within one level of DALI's and PIL's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from typing import NamedTuple

import numpy as np
from numba import njit

from fastflower.data.pipeline import View
from fastflower.data.sampler import Request


class Frame(NamedTuple):
    """A picture's size after resizing and the part of it that is kept; in pixels."""

    height: int
    width: int
    top: int
    left: int
    rows: int
    columns: int


def frame(shape: Sequence[int], shorter: int, crop_yx: np.ndarray, view: View) -> Frame:
    """What becomes of a picture of `shape` (height, width, ...); see `Request` for the other numbers."""
    height, width = shape[0], shape[1]
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


def resample_batch(
    pictures: Sequence[np.ndarray], request: Request, view: View, threads: Executor
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Resize, crop and flip decoded pictures as a request says.

    Args:
        pictures: uint8 RGB [H, W, 3].
        request: the numbers for each.
        view: geometry.
        threads: for the work.

    Yields:
        uint8 [n, h, w, 3] and which of the pictures they are, [n] int64; one pair for each shape that comes out.
    """
    frames = [
        frame(picture.shape, int(shorter), crop_yx, view)
        for picture, shorter, crop_yx in zip(pictures, request.shorter, request.crop_yx, strict=True)
    ]
    shapes = np.array([(each.rows, each.columns) for each in frames])
    for shape in np.unique(shapes, axis=0):
        alike = np.flatnonzero((shapes == shape).all(axis=1))
        images = np.empty((len(alike), *shape.tolist(), 3), np.uint8)

        def work(place: int, alike: np.ndarray = alike, images: np.ndarray = images) -> None:
            index = alike[place]
            kept = frames[index]
            flip = view.place != "whole" and bool(request.mirror[index])
            resample(pictures[index], kept.height, kept.width, kept.top, kept.left, flip, images[place])

        for _ in threads.map(work, range(len(alike))):
            pass
        yield images, alike


@njit(nogil=True, cache=True)
def resample(picture, height, width, top, left, flip, out):  # type: ignore[no-untyped-def]
    """Write a part of a resized picture.

    Args:
        picture: uint8 [H, W, 3].
        height: that it is resized to.
        width: that it is resized to.
        top: first row that is kept.
        left: first column that is kept.
        flip: left to right.
        out: uint8 [rows, columns, 3].
    """
    rows, columns = out.shape[0], out.shape[1]
    first_row, row_weights = _taps(picture.shape[0], height, top, rows)
    first_column, column_weights = _taps(picture.shape[1], width, left, columns)
    start = first_column[0]
    stop = min(first_column[columns - 1] + column_weights.shape[1], picture.shape[1])
    source = picture.reshape(picture.shape[0], picture.shape[1] * 3)[:, 3 * start : 3 * stop]
    line = np.zeros(
        source.shape[1] + 3 * column_weights.shape[1], np.float32
    )  # the taps of the last pixels may overhang
    for row in range(rows):
        _mix_rows(source, first_row[row], row_weights[row], line)
        for column in range(columns):
            weights, place = column_weights[column], 3 * (first_column[column] - start)
            red = green = blue = np.float32(0.5)
            for weight in weights:
                red += weight * line[place]
                green += weight * line[place + 1]
                blue += weight * line[place + 2]
                place += 3
            target = columns - 1 - column if flip else column
            out[row, target, 0], out[row, target, 1], out[row, target, 2] = (
                np.uint8(red),
                np.uint8(green),
                np.uint8(blue),
            )


@njit(nogil=True, cache=True)
def _mix_rows(source, first, weights, line):  # type: ignore[no-untyped-def]
    """Weighted sum of the rows of `source` from `first` on, into `line`."""
    length = source.shape[1]
    row = source[first]
    for i in range(length):
        line[i] = weights[0] * row[i]
    for tap in range(1, len(weights)):
        weight = weights[tap]
        if weight != 0:
            row = source[first + tap]
            for i in range(length):
                line[i] += weight * row[i]


@njit(nogil=True, cache=True)
def _taps(size, resized, start, count):  # type: ignore[no-untyped-def]
    """Of `count` pixels from `start` on: the first source pixel, [count], and the weights from there, [count, taps]."""
    scale = size / resized
    support = max(scale, 1.0)
    first, used = np.empty(count, np.int64), 0
    weights = np.zeros((count, int(2 * support) + 2), np.float32)
    for i in range(count):
        center = (start + i + 0.5) * scale
        low, high = int(np.floor(center - support + 0.5)), int(np.floor(center + support + 0.5))
        first[i] = min(max(low, 0), size - 1)
        total = 0.0
        for k in range(low, high):
            weight = max(1 - abs(k + 0.5 - center) / support, 0.0)
            tap = min(max(k, 0), size - 1) - first[i]  # beyond the border is what is at the border, as DALI has it
            weights[i, tap] += weight
            total += weight
            used = max(used, tap + 1)
        weights[i] /= total
    return first, weights[:, :used].copy()
