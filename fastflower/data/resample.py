"""Resize, crop, flip and normalize on a CPU: only what is kept is computed, by code that is compiled when first used.

The filter is that of the DALI graph (`fastflower.data.pipeline`), which is several times slower on a CPU: a
triangle that is widened where pictures shrink. Levels of pixels are within one of DALI's, and but for the outermost
pixels of a picture that shrinks within one of PIL's and torchvision's. Beyond the border is what is at the border, as
DALI has it on every device; PIL has nothing there. Of 270 photographs of 192 to 512 pixels, shrunk to 128, 256 and 320,
those pixels differ from PIL's by 0.1 to 0.6 levels on average, and by 16 at most (Pillow 13, 2026-11-30).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from typing import Any, NamedTuple

import numba
import numpy as np
from numba import types
from numba.extending import intrinsic
from numpy.typing import NDArray

from fastflower.arrays import Bytes, Ints, Singles
from fastflower.data.compiled import compiled, is_tested
from fastflower.data.geometry import Frame, frames
from fastflower.data.memory import Memory
from fastflower.data.sampler import Request
from fastflower.data.view import Normalization, View

AT_ONCE = 8  # pictures of a task for a thread: few enough to spread a batch, and so many that tasks cost nothing


class Region(NamedTuple):
    """What is there of a decoded picture."""

    pixels: Bytes  # RGB [h, w, 3]
    corner: tuple[int, int]  # row and column where they begin, counted in such pixels
    shape: tuple[int, int]  # height and width of the picture
    factor: int = 1  # of how many rows and columns of the picture a pixel is made
    overhang: tuple[float, float] = (0.0, 0.0)  # how much of the first row and column lies before the picture's


class Resampler:
    """Makes pictures of one view and normalization."""

    def __init__(self, view: View, normalization: Normalization | None, memory: Memory | None = None) -> None:
        """Pictures are float32 with a normalization, else uint8 and without color shifts; they are made in `memory`."""
        self.view, self.normalization = view, normalization
        self.memory = memory or Memory()
        self.dtype: type[np.generic] = np.float32 if normalization else np.uint8
        self.mean, self.std = np.zeros(3, np.float32), np.ones(3, np.float32)
        if normalization:
            self.mean = np.float32(255) * np.array(normalization.mean, np.float32)
            self.std = np.float32(255) * np.array(normalization.std, np.float32)

    def begin(self, request: Request) -> Making:
        """Pictures of a request, none of which is made yet."""
        return Making(self, request)


class Making:
    """Pictures of a request, which are made in any order, piece by piece."""

    def __init__(self, resampler: Resampler, request: Request) -> None:
        self.request = request
        self._resampler = resampler
        self._crops: NDArray[Any] | None = None  # [n, crop, crop, 3]
        self._wholes: dict[int, NDArray[Any]] = {}  # of a view without a crop

    def add(
        self,
        places: Ints,
        shapes: Ints,
        region_of: Callable[[int, Frame], Region],
        threads: Executor,
        at_once: int = AT_ONCE,
    ) -> list[Future[None]]:
        """Begin to resize, crop, flip and normalize pictures as the request says.

        Args:
            places: of the pictures in the request, [m].
            shapes: their heights and widths, [m, 2].
            region_of: gives of each, by its number below m, at least what its frame keeps; called by the threads.
            threads: for the work.
            at_once: pictures of a thread's task.

        Returns:
            The tasks, to wait for.
        """
        resampler, request = self._resampler, self.request.select(places)
        kept = frames(shapes, request.shorter, request.crop_yx, resampler.view)
        flips = request.mirror.astype(bool) & (resampler.view.place != "whole")
        means: Singles = np.repeat(resampler.mean[None], len(kept), axis=0)
        if resampler.normalization and request.shift is not None:
            means = means - np.float32(255) * request.shift
        room = [self._room(place, frame) for place, frame in zip(places.tolist(), kept, strict=True)]

        def work(start: int) -> None:
            for i in range(start, min(start + at_once, len(kept))):
                resample(region_of(i, kept[i]), kept[i], flips[i], means[i], resampler.std, room[i])

        return [threads.submit(work, start) for start in range(0, len(kept), at_once)]

    def _room(self, place: int, frame: Frame) -> NDArray[Any]:
        """Memory for a picture."""
        resampler = self._resampler
        if resampler.view.place == "whole":
            self._wholes[place] = np.empty((frame.rows, frame.columns, 3), resampler.dtype)
            return self._wholes[place]
        if self._crops is None:
            shape = (len(self.request), resampler.view.crop, resampler.view.crop, 3)
            self._crops = resampler.memory.take(shape, resampler.dtype)
        picture: NDArray[Any] = self._crops[place]
        return picture

    def finish(self) -> Iterator[tuple[Bytes | Singles, Ints]]:
        """All pictures, when all are made.

        Yields:
            [n, h, w, 3] and which of the request's pictures they are, [n]; one pair for each shape that comes out.
        """
        if self._crops is not None:
            yield self._crops, np.arange(len(self.request))
        shapes = {place: picture.shape for place, picture in self._wholes.items()}
        for shape in sorted(set(shapes.values())):
            alike = np.array(sorted(place for place, other in shapes.items() if other == shape))
            images = self._resampler.memory.take((len(alike), *shape), self._resampler.dtype)
            for image, place in zip(images, alike.tolist(), strict=True):
                image[:] = self._wholes[place]
            yield images, alike


@compiled()
def resample(region, frame, flip, mean, std, out):  # type: ignore[no-untyped-def]
    """Write a part of a resized picture.

    The axis along which there is less to do comes first: rows, where they become fewer.

    Args:
        region: a `Region` of the picture.
        frame: a `fastflower.data.geometry.Frame`.
        flip: left to right.
        mean: float32 [3], subtracted from the rounded levels.
        std: float32 [3], that they are divided by then.
        out: [rows, columns, 3], uint8 or float32.

    Raises:
        ValueError: the region is too small.
    """
    pixels, corner, shape, factor, overhang = region
    top, bottom, first_row, row_weights = _taps(shape[0] / factor, overhang[0], frame.height, frame.top, frame.rows)
    left, right, first_column, column_weights = _taps(
        shape[1] / factor, overhang[1], frame.width, frame.left, frame.columns
    )
    top, bottom, left, right = top - corner[0], bottom - corner[0], left - corner[1], right - corner[1]
    if min(top, left) < 0 or bottom > pixels.shape[0] or right > pixels.shape[1]:
        raise ValueError("the region lacks pixels of the frame")  # compiled code would read whatever lies there
    if flip:
        first_column, column_weights = first_column[::-1].copy(), column_weights[::-1].copy()
    source = pixels.reshape(pixels.shape[0], pixels.shape[1] * 3)[top:bottom, 3 * left : 3 * right]
    # Taps of no weight may overhang, and pixels are read and written four values at a time.
    line = np.zeros((1, source.shape[1] + 3 * column_weights.shape[1] + 1), np.float32)
    means, stds = np.empty(frame.columns * 3, np.float32), np.empty(frame.columns * 3, np.float32)
    for channel in range(3):
        means[channel::3], stds[channel::3] = mean[channel], std[channel]
    resized = np.empty((1, len(means) + 1), np.float32)
    levels = out.reshape(frame.rows, len(means))
    if frame.height > shape[0] / factor:
        lines = np.empty((len(source), len(means) + 1), np.float32)
        for row in range(len(source)):
            for i in range(source.shape[1]):
                line[0, i] = source[row, i]
            _resize_row(line, first_column, column_weights, lines, row)
        for row in range(frame.rows):
            _mix_rows(lines, first_row[row], row_weights, row, resized)
            _normalize(resized, means, stds, levels, row)
    else:
        for row in range(frame.rows):
            _mix_rows(source, first_row[row], row_weights, row, line)
            _resize_row(line, first_column, column_weights, resized, 0)
            _normalize(resized, means, stds, levels, row)


# Rows are passed as arrays and numbers: a view for each would be counted, at a tenth of the time.


@compiled()
def _mix_rows(rows, first, weights, row, line):  # type: ignore[no-untyped-def]
    """Sum of rows from the first on by a row of weights, into `line`; two at once, which halves the passes over it."""
    last = len(rows) - 1
    for tap in range(0, weights.shape[1], 2):
        a, b = weights[row, tap], weights[row, tap + 1]
        one, other = min(first + tap, last), min(first + tap + 1, last)  # of no weight where there is none
        if tap == 0:
            for i in range(rows.shape[1]):
                line[0, i] = a * rows[one, i] + b * rows[other, i]
        elif a != 0 or b != 0:
            for i in range(rows.shape[1]):
                line[0, i] = line[0, i] + a * rows[one, i] + b * rows[other, i]


@compiled()
def resize_row(line, first, weights, resized, row):  # type: ignore[no-untyped-def]
    """Row `row` of `resized`: of each column the weighted sum of pixels of `line` from its first on.

    What `resize_row_by_vectors` is tested against, and what takes its place on versions of Numba that it was not tested
    with. A picture then takes 3.4 to 4 times as long (a crop of 224 pixels of pictures of 331 and 500, on a thread of
    an AMD EPYC, 2026-11-30).
    """
    for column in range(len(first)):
        for channel in range(3):
            total = np.float32(0)
            for tap in range(0, weights.shape[1], 2):
                pixel = 3 * (first[column] + tap) + channel
                two = line[0, pixel] * weights[column, tap] + line[0, pixel + 3] * weights[column, tap + 1]
                total = total + two
            resized[row, 3 * column + channel] = total


@compiled()
def resize_row_by_vectors(line, first, weights, resized, row):  # type: ignore[no-untyped-def]
    """The same, to the bit, in instructions on whole pixels."""
    for column in range(len(first)):
        _sum_pixels(line, first[column], weights, resized, row, column)  # type: ignore[call-arg]


@intrinsic
def _sum_pixels(typing, line, first, weights, resized, row, column):  # type: ignore[no-untyped-def]
    """A pixel of `resized` is the sum of the pixels of `line` from the first on, by the weights of the column.

    Written for LLVM, which does not vectorize loops over three channels: a pixel is four values, of which the last
    belongs to the next pixel. So rows have a value more than their pixels, and are written from left to right.
    """

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        from llvmlite import ir  # here, for a version of Numba that lacks them and gets the plain loop
        from numba.core import cgutils

        index, lanes = ir.IntType(64), ir.VectorType(ir.FloatType(), 4)
        line, weights, resized = (
            context.make_array(signature.args[i])(context, builder, arguments[i]) for i in (0, 2, 3)
        )
        _, first, _, _, row, column = arguments

        def address(array: Any, row: Any, column: Any) -> Any:
            width = builder.extract_value(array.shape, 1)
            return builder.gep(array.data, [builder.add(builder.mul(row, width), column)])

        def pixel(array: Any, row: Any, column: Any) -> Any:
            value = address(array, row, builder.mul(column, ir.Constant(index, 3)))
            return builder.bitcast(value, lanes.as_pointer())

        def weighted(tap: Any) -> Any:
            weight = builder.load(address(weights, column, tap))
            everywhere = ir.Constant(lanes, ir.Undefined)
            for lane in range(4):
                everywhere = builder.insert_element(everywhere, weight, ir.Constant(ir.IntType(32), lane))
            values = builder.load(pixel(line, ir.Constant(index, 0), builder.add(first, tap)), align=4)
            return builder.fmul(values, everywhere)

        total = cgutils.alloca_once_value(builder, ir.Constant(lanes, [0.0] * 4))
        taps = builder.extract_value(weights.shape, 1)
        with cgutils.for_range_slice(builder, ir.Constant(index, 0), taps, ir.Constant(index, 2), index) as (tap, _):
            two = builder.fadd(weighted(tap), weighted(builder.add(tap, ir.Constant(index, 1))))
            builder.store(builder.fadd(builder.load(total), two), total)
        builder.store(builder.load(total), pixel(resized, row, column), align=4)
        return context.get_dummy_value()

    return types.void(line, first, weights, resized, row, column), code


_resize_row = resize_row_by_vectors if is_tested(numba.__version__) else resize_row


@compiled(error_model="numpy")  # Python's looks for zeros, one by one
def _normalize(resized, means, stds, levels, row):  # type: ignore[no-untyped-def]
    """Row `row` of `levels`: those of `resized`, rounded, less their means, by their deviations."""
    for i in range(len(means)):
        levels[row, i] = (np.float32(np.int32(resized[0, i] + np.float32(0.5))) - means[i]) / stds[i]


@compiled(error_model="numpy")
def _taps(size, overhang, resized, start, count):  # type: ignore[no-untyped-def]
    """What `count` pixels from `start` on, of an axis that is resized from `size` pixels, are made of.

    The first and the last of the `size` pixels, which need not be a whole number, may be there in part: of the first
    the `overhang` is missing.

    Returns:
        first pixel that is used at all, end of those that are, first for each counted from there ([count]), and weights
        from each first on ([count, taps]; taps are even in number, the last may have no weight).
    """
    scale = size / resized
    support = max(scale, 1.0)
    pixels = int(np.ceil(overhang + size))
    first, used = np.empty(count, np.int64), 0
    weights = np.zeros((count, int(2 * support) + 3), np.float32)
    for i in range(count):
        center = (start + i + 0.5) * scale + overhang
        low, high = int(np.floor(center - support + 0.5)), int(np.floor(center + support + 0.5))
        first[i] = min(max(low, 0), pixels - 1)
        total = 0.0
        for k in range(low, high):
            weight = max(1 - abs(k + 0.5 - center) / support, 0.0)
            tap = min(max(k, 0), pixels - 1) - first[i]  # beyond the border is what is at the border, as DALI has it
            weights[i, tap] += weight
            total += weight
            used = max(used, tap + 1)
        weights[i] /= total
    begin, end = first[0], min(first[-1] + used, pixels)
    return begin, end, first - begin, weights[:, : used + used % 2].copy()
