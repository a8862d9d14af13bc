"""The DALI graph: encoded bytes in, cropped (or whole) pictures out. One definition for GPU and CPU.

Resizing, cropping and flipping are one operator that computes only the region that is kept. On a CPU the graph ends
after decoding that region, since `fastflower.data.resample` does the rest several times as fast there.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Sequence
from typing import Literal, TypeVar

import numpy as np
import torch
from nvidia.dali import fn, math, pipeline_def, types
from nvidia.dali.backend import TensorListCPU, TensorListGPU
from nvidia.dali.pipeline import DataNode, Pipeline

from fastflower.arrays import Bytes, Int32s, Singles
from fastflower.data.decoding import decode
from fastflower.data.geometry import centered
from fastflower.data.sampler import Request
from fastflower.data.view import Engine, Normalization, View

Pictures = TensorListCPU | TensorListGPU
Images = Sequence[Bytes | torch.Tensor]
Numbers = tuple[Int32s, Singles, Int32s]
Inputs = tuple[Images, Int32s, Singles, Int32s]
Source = Callable[[], Inputs]
Half = TypeVar("Half")


def inputs(images: Images, request: Request) -> Inputs:
    """What a source gives for a request, with its `images`: a shorter side of 0 says "as stored" there, for None."""
    shorter = np.zeros(len(request), np.int32) if request.shorter is None else request.shorter
    return images, shorter, request.crop_yx, request.mirror


def build_pipeline(
    source: Source,
    view: View,
    engine: Engine,
    batch: int,
    normalization: Normalization | None = None,
    *,
    decoded: Literal["cpu", "gpu"] | None = None,
) -> Pipeline:
    """A built pipeline whose single output is a batch of RGB pictures in [N, H, W, C] layout.

    Args:
        source: called once a batch for its `inputs`; raises StopIteration at the end.
        view: geometry.
        engine: device and resources.
        batch: most pictures in a batch.
        normalization: None gives uint8; else float16, normalized.
        decoded: where the source's images are pixels already, uint8 [H, W, 3], whose memory stays as it is for as long
            as the pipeline is used; None = they are encoded.
    """
    return _built(_definition(source, view, engine, normalization, decoded, **_resources(engine, batch)))


def build_decoder(source: Source, view: View, engine: Engine, batch: int) -> Pipeline:
    """A built pipeline whose outputs are what a view needs of RGB pictures, decoded on the CPU.

    They are the regions [h, w, 3], their corners (row and column in the picture, [2] int32) and the pictures' shapes
    (height and width, [2] int32); for the arguments see `build_pipeline`.
    """
    return _built(_decoder(source, view, engine, **_resources(engine, batch)))


def _resources(engine: Engine, batch: int) -> dict[str, int | None]:
    return {
        "batch_size": batch,
        "num_threads": engine.threads,
        "device_id": engine.device_id,
        "prefetch_queue_depth": engine.prefetch,
    }


def _built(pipeline: Pipeline) -> Pipeline:
    with warnings.catch_warnings():  # only a random crop has a use for positions and flips
        warnings.filterwarnings("ignore", message="The external source node .* produces")
        pipeline.build()
    return pipeline


@pipeline_def
def _definition(
    source: Source,
    view: View,
    engine: Engine,
    normalization: Normalization | None,
    decoded: Literal["cpu", "gpu"] | None = None,
) -> DataNode:
    images, shorter, crop_yx, mirror = _inputs(source, decoded)
    pictures = images if decoded else decode(images, engine)
    if decoded == "cpu" and engine.device == "gpu":
        pictures = pictures.gpu()
    size, start = size_and_start(fn.cast(pictures.shape()[0:2], dtype=types.INT32), shorter, crop_yx, view)
    resampling = {"size": _float(size), "interp_type": types.INTERP_LINEAR, "antialias": True}
    if view.place == "whole":
        pictures = fn.resize(pictures, **resampling)
    else:
        position = _float(start) / _float(math.max(size - view.crop, 1))  # DALI takes a share of the free pixels
        pictures = fn.resize_crop_mirror(
            pictures,
            crop=(view.crop, view.crop),
            crop_pos_y=position[0],
            crop_pos_x=position[1],
            mirror=mirror,
            **resampling,
        )
    if normalization is None:
        return pictures
    return fn.crop_mirror_normalize(
        pictures,
        dtype=types.FLOAT16,
        output_layout="HWC",
        mean=[255 * value for value in normalization.mean],
        std=[255 * value for value in normalization.std],
    )


@pipeline_def
def _decoder(source: Source, view: View, engine: Engine) -> tuple[DataNode, DataNode, DataNode]:
    encoded, shorter, crop_yx, _ = fn.external_source(source=source, num_outputs=4, batch=True)
    return decode_region(encoded, shorter, crop_yx, view, engine)


def _inputs(source: Source, decoded: Literal["cpu", "gpu"] | None) -> Sequence[DataNode]:
    """The source's four outputs. Pixels in host memory are not copied.

    Those on a GPU come apart from the numbers, which stay on the host. DALI copies them there, on torch's current
    stream, into one piece: memory it takes as it is only if pictures lie one behind another in all batches.
    """
    if decoded is None:
        return fn.external_source(source=source, num_outputs=4, batch=True)
    if decoded == "cpu":
        return fn.external_source(source=source, num_outputs=4, batch=True, layout=["HWC", "", "", ""], no_copy=True)
    images, numbers = in_two(source)
    pixels = fn.external_source(source=images, batch=True, device="gpu", layout="HWC")
    return [pixels, *fn.external_source(source=numbers, num_outputs=3, batch=True)]


def in_two(source: Source) -> tuple[Callable[[], Images], Callable[[], Numbers]]:
    """A source as two, of its images and of its numbers, which end with it.

    Of a pipeline with several sources DALI asks each once a batch, in no certain order, and all of them also where one
    has ended: only then has the batch been asked for, and the next to be asked is that of another epoch.
    """
    images: deque[Images | None] = deque()  # asked for by the other; None: at the end
    numbers: deque[Numbers | None] = deque()

    def ask() -> None:
        try:
            made, shorter, crop_yx, mirror = source()
        except StopIteration:
            images.append(None)
            numbers.append(None)
        else:
            images.append(made)
            numbers.append((shorter, crop_yx, mirror))

    return lambda: _next(images, ask), lambda: _next(numbers, ask)


def _next(waiting: deque[Half | None], ask: Callable[[], None]) -> Half:
    if not waiting:
        ask()
    half = waiting.popleft()
    if half is None:
        raise StopIteration
    return half


def decode_region(
    encoded: DataNode, shorter: DataNode, crop_yx: DataNode, view: View, engine: Engine
) -> tuple[DataNode, DataNode, DataNode]:
    """What a view needs of pictures, the same pixels as if all were decoded; see `build_decoder` for the outputs.

    Of a JPEG picture, what lies beyond is neither transformed nor converted, and the rows below it are not read.
    """
    shape = fn.cast(fn.peek_image_shape(encoded)[0:2], dtype=types.INT32)
    if view.place == "whole":
        return decode(encoded, engine), shape * 0, shape
    size, start = size_and_start(shape, shorter, crop_yx, view)
    scale = _float(shape) / _float(size)
    reach = math.max(scale, 1.0) + 1  # of the filter, in pixels of the picture; one more, since this is rounded
    corner = fn.cast(math.max(math.floor(_float(start) * scale - reach), 0.0), dtype=types.INT32)
    end = fn.cast(math.ceil(_float(start + view.crop) * scale + reach), dtype=types.INT32)
    pixels = fn.decoders.image_slice(
        encoded,
        device="cpu",
        output_type=types.RGB,
        start=corner,
        shape=math.min(end, shape) - corner,
        axis_names="HW",
    )
    return pixels, corner, shape


def size_and_start(shape: DataNode, shorter: DataNode, crop_yx: DataNode, view: View) -> tuple[DataNode, DataNode]:
    """Height and width of pictures of `shape` after resizing, and row and column where the crop begins in them.

    They are those of `fastflower.data.geometry.frames`, in operators of DALI.
    """
    shortest = fn.reductions.min(shape)
    target = shorter + (shorter == 0) * math.max(shortest, view.crop)
    size = (shape * target) // shortest
    free = size - view.crop
    if view.place != "random":
        start = centered(free)
    else:
        start = math.min(fn.cast(math.floor(crop_yx * (free + 1)), dtype=types.INT32), free)
    return size, start


def _float(numbers: DataNode) -> DataNode:
    return fn.cast(numbers, dtype=types.FLOAT)
