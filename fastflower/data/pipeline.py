"""The DALI graph: encoded bytes in, cropped (or whole) pictures out. One definition for GPU and CPU.

Resizing, cropping and flipping are one operator that computes only the region that is kept. On a CPU the graph ends
after decoding, since `fastflower.data.resample` does the rest several times as fast there.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Sequence
from typing import Literal, TypeVar

import numpy as np
import torch
from nvidia.dali import fn, math, pipeline_def, types
from nvidia.dali.backend import TensorCPU, TensorListCPU, TensorListGPU
from nvidia.dali.pipeline import DataNode, Pipeline

from fastflower.arrays import Bytes
from fastflower.data.decoding import decode, decode_region
from fastflower.data.geometry import centered
from fastflower.data.sampler import Request
from fastflower.data.view import Engine, Normalization, View

Pictures = TensorListCPU | TensorListGPU
Images = Sequence[Bytes | torch.Tensor | TensorCPU]
Numbers = tuple[TensorListCPU, TensorListCPU, TensorListCPU]
Inputs = tuple[Images, TensorListCPU, TensorListCPU, TensorListCPU]
Source = Callable[[], Inputs]
Half = TypeVar("Half")


def inputs(images: Images, request: Request) -> Inputs:
    """What a source gives for a request, with its `images`: a shorter side of 0 says "as stored" there, for None.

    The pipeline reads it where it is, and whoever gave it keeps it until its batch is made. What it holds of NumPy's
    it drops after that in a thread of DALI's, which needs Python's lock for it; of DALI's own types it needs none.
    """
    shorter = np.zeros(len(request), np.int32) if request.shorter is None else request.shorter
    return images, TensorListCPU(shorter), TensorListCPU(request.crop_yx), TensorListCPU(request.mirror)


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


class Decoder:
    """What `take_region` takes of pictures on a CPU, of some while others are being decoded."""

    def __init__(self, view: View, engine: Engine, batch: int) -> None:
        """Build it; see `build_pipeline` for arguments."""
        self._names = _used(view, engine)
        # it begins whatever it is given, also ahead of what was taken; a longer queue would wait for more of it
        resources = _resources(engine, batch) | {"prefetch_queue_depth": 1}
        self._pipeline = _built(_decoder(view, engine, self._names, **resources))

    def begin(self, given: Inputs) -> None:
        """Begin with at most `batch` pictures, whose inputs are kept by the caller until they are taken."""
        for name, numbers in zip(self._names, given, strict=False):
            self._pipeline.feed_input(name, numbers)
        self._pipeline.schedule_run()

    def take(self) -> tuple[TensorListCPU, TensorListCPU, TensorListCPU]:
        """What `take_region` takes of the pictures that were begun first, when it is there.

        Raises:
            RuntimeError: one of them cannot be decoded, and the decoder cannot go on.
        """
        outputs: tuple[TensorListCPU, TensorListCPU, TensorListCPU] = self._pipeline.outputs()
        return outputs


def _used(view: View, engine: Engine) -> tuple[str, ...]:
    """Names for the first of `inputs`, as many as `take_region` uses, since DALI refuses others."""
    if view.place == "whole" or engine.decode == "whole":
        return ("images",)
    return ("images", "shorter", "crop_yx") if view.place == "random" else ("images", "shorter")


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
    pixels, corner, shape = take_region(images, shorter, crop_yx, view, engine, decoded=decoded is not None)
    if decoded == "cpu" and engine.device == "gpu":
        pixels = pixels.gpu()
    size, start = size_and_start(shape, shorter, crop_yx, view)
    resampling = {"interp_type": types.INTERP_LINEAR, "antialias": True}
    if view.place == "whole":
        pictures = fn.resize(pixels, size=_float(size), **resampling)
    else:
        begin, end = _place(pixels, corner, shape, size, start, view)
        flip = _float(mirror) * types.Constant(np.array([0, 1], np.float32), device="cpu")
        pictures = fn.resize(
            pixels,
            size=(view.crop, view.crop),
            roi_start=begin * (1 - flip) + end * flip,  # a place that ends where it begins is flipped
            roi_end=end * (1 - flip) + begin * flip,
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
def _decoder(view: View, engine: Engine, names: tuple[str, ...]) -> tuple[DataNode, DataNode, DataNode]:
    images, *numbers = (fn.external_source(name=name, no_copy=True) for name in names)
    shorter, crop_yx = (*numbers, None, None)[:2]
    return take_region(images, shorter, crop_yx, view, engine)


def _inputs(source: Source, decoded: Literal["cpu", "gpu"] | None) -> Sequence[DataNode]:
    """The source's four outputs. Pixels in host memory are not copied.

    Those on a GPU come apart from the numbers, which stay on the host. DALI copies them within the GPU's memory into
    one piece, on torch's current stream; it takes memory as it is only where all batches lie in one piece already.
    """
    if decoded is None:
        return fn.external_source(source=source, num_outputs=4, batch=True, no_copy=True)
    if decoded == "cpu":
        return fn.external_source(source=source, num_outputs=4, batch=True, layout=["HWC", "", "", ""], no_copy=True)
    images, numbers = in_two(source)
    pixels = fn.external_source(source=images, batch=True, device="gpu", layout="HWC")
    return [pixels, *fn.external_source(source=numbers, num_outputs=3, batch=True)]


def in_two(source: Source) -> tuple[Callable[[], Images], Callable[[], Numbers]]:
    """A source as two, of its images and of its numbers, which both end where it does.

    DALI asks all sources of a pipeline once a batch, in no certain order, and the second one also where the first has
    ended. So whichever comes first asks the given source, and keeps the other half, or the end, for the other one.
    """
    images: deque[Images | None] = deque()  # kept for the one that asks second; None: the end
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


def take_region(
    images: DataNode,
    shorter: DataNode | None,
    crop_yx: DataNode | None,
    view: View,
    engine: Engine,
    *,
    decoded: bool = False,
) -> tuple[DataNode, DataNode, DataNode]:
    """The region of pictures that a view needs, or all of them if the engine decodes whole ones.

    Of a JPEG picture, what lies beyond a region is neither transformed nor converted, and the rows below it are not
    read.

    Args:
        images: encoded bytes, or pixels [H, W, 3] if they are `decoded`.
        shorter: what their shorter sides become; not used for whole pictures.
        crop_yx: where their crops are; used only where these are at random.
        view: geometry.
        engine: what decodes.
        decoded: whether that has been done.

    Returns:
        The regions [h, w, 3], their corners (row and column in the picture, [2] int32) and the pictures' shapes (height
        and width, [2] int32).
    """
    if view.place == "whole" or engine.decode == "whole":
        pixels = images if decoded else decode(images, engine)
        shape = _shape(pixels)
        return pixels, shape * 0, shape
    shape = _shape(images) if decoded else fn.cast(fn.peek_image_shape(images)[0:2], dtype=types.INT32)
    size, start = size_and_start(shape, shorter, crop_yx, view)
    scale = _float(shape) / _float(size)
    reach = math.max(scale, 1.0) + 1  # of the filter, in pixels of the picture; one more, since this is rounded
    corner = fn.cast(math.max(math.floor(_float(start) * scale - reach), 0.0), dtype=types.INT32)
    end = fn.cast(math.ceil(_float(start + view.crop) * scale + reach), dtype=types.INT32)
    extent = math.min(end, shape) - corner
    if decoded:
        return fn.slice(images, start=corner, shape=extent, axis_names="HW"), corner, shape
    return decode_region(images, corner, extent, engine), corner, shape


def _place(
    pixels: DataNode, corner: DataNode, shape: DataNode, size: DataNode, start: DataNode, view: View
) -> tuple[DataNode, DataNode]:
    """Where the crop begins and ends in a region's pixels, [2] each, before they are resized; not beyond them, where
    DALI would read whatever is there.
    """
    scale = _float(shape) / _float(size)
    end = _float(start + view.crop) * scale - _float(corner)
    return _float(start) * scale - _float(corner), math.min(end, _float(_shape(pixels)))


def size_and_start(
    shape: DataNode, shorter: DataNode, crop_yx: DataNode | None, view: View
) -> tuple[DataNode, DataNode]:
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


def _shape(pixels: DataNode) -> DataNode:
    return fn.cast(pixels.shape()[0:2], dtype=types.INT32)


def _float(numbers: DataNode) -> DataNode:
    return fn.cast(numbers, dtype=types.FLOAT)
