"""From encoded bytes to pixels: what can be decoded and what not, by one decoder for whoever asks."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.backend import TensorListGPU
from nvidia.dali.pipeline import DataNode, Pipeline
from torch.utils.dlpack import from_dlpack

from fastflower.arrays import Bytes, Ints
from fastflower.data.converted import UnreadableError
from fastflower.data.pieces import pieces
from fastflower.data.records import LEAVE_OUT, Records, read_image
from fastflower.data.soundness import convert, header_shape, size_of
from fastflower.data.view import Engine
from fastflower.errors import UserError

NAMED = 5  # records in a sentence
BATCH = 32  # pictures that are decoded at once, and held until the next batch


def read_picture(records: Records, index: int) -> Bytes:
    """The encoded image of a record, [length] uint8, that has a picture's header and is not cut off; see `convert`.

    One without a header among others makes DALI 2.4 crash now and then, where it should report an error. One that is
    cut off would be found out only when a crop reaches what it lacks, epochs later.

    Raises:
        UserError: the record cannot be read or is no such picture; names file and record.
    """
    try:
        return convert(read_image(records, index))
    except UnreadableError as error:
        raise undecodable((records, index)) from error


def undecodable(*bad: tuple[Records, int]) -> UserError:
    """The sentence for records that cannot be decoded: tables and numbers in them. It reads those that it names."""
    places = [
        (records.describe(index), f"({records.length[index]} bytes{why_not(records, index)})")
        for records, index in bad[:NAMED]
    ]
    if len(bad) == 1:
        ((where, size),) = places
        return UserError(
            f"{where} cannot be decoded as a picture {size}: replace the record, or leave it out {LEAVE_OUT}."
        )
    named = "; ".join(" ".join(place) for place in places)
    more = f"; and {len(bad) - NAMED} more" if len(bad) > NAMED else ""
    return UserError(
        f"{len(bad)} records cannot be decoded as pictures: replace them, or leave them out {LEAVE_OUT}. They are: "
        f"{named}{more}."
    )


def why_not(records: Records, index: int) -> str:
    """Why a record cannot be decoded, after a comma; "" where there is no more to say than that."""
    try:
        convert(read_image(records, index))
    except UnreadableError as error:
        return f", {error}" if str(error) else ""
    except UserError:  # it has changed meanwhile
        pass
    return ""


def shapes_of(records: Records) -> Ints:
    """Height and width of each picture by its header, [n, 2] int64; not turned by EXIF.

    Raises:
        UserError: names a record that cannot be read or has no picture's header.
    """
    sizes = []
    for index in range(len(records)):
        try:
            sizes.append(size_of(read_image(records, index)))
        except UnreadableError as error:
            raise undecodable((records, index)) from error
    return np.array(sizes, np.int64).reshape(-1, 2)


def decode(encoded: DataNode, engine: Engine) -> DataNode:
    """Encoded bytes to RGB uint8 [H, W, 3], turned upright by EXIF."""
    return fn.decoders.image(encoded, output_type=types.RGB, **_by(engine))


def decode_region(encoded: DataNode, corner: DataNode, extent: DataNode, engine: Engine) -> DataNode:
    """The part of `extent` (height and width, [2] int32) at a corner (row and column, [2] int32) of what `decode` makes
    of pictures; on a CPU the same pixels.
    """
    return fn.decoders.image_slice(
        encoded, output_type=types.RGB, start=corner, shape=extent, axis_names="HW", **_by(engine)
    )


def _by(engine: Engine) -> dict[str, Any]:
    if engine.device == "cpu":
        return {"device": "cpu"}
    return {
        "device": "mixed",
        "hw_decoder_load": engine.hw_decoder_load,
        "jpeg_fancy_upsampling": True,  # as CPU decoders do; without it chroma differs visibly
    }


def decodable(encoded: Bytes) -> bool:
    """Whether encoded image bytes ([length] uint8) can be read."""
    try:
        return bool(ShapeDecoder(threads=1).shapes([convert(encoded)]).all())
    except UnreadableError:
        return False


def first_undecodable(records: Records, indices: Ints) -> UserError | None:
    """The sentence for the first of the records at `indices` ([m] int64) that the decoder cannot read."""
    for index in indices:
        if not decodable(read_image(records, index)):
            return undecodable((records, index))
    return None


class ShapeDecoder:
    """Decodes as training on a CPU does, and keeps only the pictures' shapes."""

    def __init__(self, threads: int) -> None:
        """Prepare for pictures that `threads` threads decode; DALI is asked when the first ones come."""
        self._threads = threads
        self._pipeline: Pipeline | None = None

    def shapes(self, encoded: Sequence[Bytes]) -> Ints:
        """Heights and widths, [n, 2], of at most BATCH pictures' bytes; 0 where a picture cannot be decoded."""
        several = pieces(decoded_sizes(encoded), Engine(threads=self._threads).piece)
        return np.concatenate([self._shapes(encoded[piece]) for piece in several])

    def _shapes(self, encoded: Sequence[Bytes]) -> Ints:
        try:
            return self._decode(encoded)
        except RuntimeError:  # it names no picture, and leaves a pipeline that cannot go on
            self._pipeline = None
            if len(encoded) == 1:
                return np.zeros((1, 2), np.int64)
            return np.concatenate([self._shapes([data]) for data in encoded])

    def _decode(self, encoded: Sequence[Bytes]) -> Ints:
        @pipeline_def(batch_size=BATCH, num_threads=self._threads, device_id=None, prefetch_queue_depth=1)
        def definition() -> DataNode:
            return decode(fn.external_source(name="encoded"), Engine()).shape()

        if self._pipeline is None:
            self._pipeline = definition()
            self._pipeline.build()
        self._pipeline.feed_input("encoded", list(encoded))
        (shapes,) = self._pipeline.run()
        sizes: Ints = shapes.as_array()[:, :2].copy()  # the next run writes over it
        return sizes


def decoded_pictures(
    records: Records, indices: Ints, engine: Engine, finish: Callable[[DataNode], DataNode]
) -> Iterator[tuple[int, Bytes | torch.Tensor]]:
    """The records at `indices`, in that order, each with its number; see `decoded_batches`."""
    for batch, pictures in decoded_batches(records, indices, engine, finish):
        yield from zip(batch.tolist(), pictures, strict=True)


def decoded_batches(
    records: Records, indices: Ints, engine: Engine, finish: Callable[[DataNode], DataNode]
) -> Iterator[tuple[Ints, list[Bytes | torch.Tensor]]]:
    """The records at `indices` ([n] int64), in that order, BATCH at once, or fewer where they are large.

    Args:
        records: of a split.
        indices: which.
        engine: where they are decoded.
        finish: the rest of the DALI graph, from decoded pictures, uint8 RGB [H, W, 3] in the engine's memory, on.

    Yields:
        Records' numbers and what `finish` makes of each, in host memory or on the GPU; valid until the next batch.

    Raises:
        UserError: a record cannot be read or decoded; names file and record.
    """
    pieces_of_them = _read(records, indices, engine.piece)
    begun: deque[Ints] = deque()
    failures: list[UserError] = []

    def source() -> list[Bytes]:
        try:
            batch, encoded = next(pieces_of_them)
        except UserError as error:
            failures.append(error)  # it would cross DALI's native code: end the data and raise it after
            raise StopIteration from error
        begun.append(batch)
        return encoded

    @pipeline_def(batch_size=BATCH, num_threads=engine.threads, device_id=engine.device_id)
    def definition() -> DataNode:
        return finish(decode(fn.external_source(source=source, batch=True), engine))

    pipeline = definition()
    while True:
        try:
            (pictures,) = pipeline.run()
        except StopIteration:
            if failures:
                raise failures[0] from None
            return
        except RuntimeError as error:
            raise first_undecodable(records, begun[0]) or error from error
        batch = begun.popleft()
        on_gpu = isinstance(pictures, TensorListGPU)
        yield batch, [from_dlpack(pictures[i]) if on_gpu else np.asarray(pictures[i]) for i in range(len(batch))]
        if on_gpu:  # DALI uses the memory of its pictures again when we drop them
            torch.cuda.synchronize(engine.device_id)


def _read(records: Records, indices: Ints, most: int) -> Iterator[tuple[Ints, list[Bytes]]]:
    """The records at `indices`, encoded, BATCH at once, or so many fewer that they take `most` bytes when decoded."""
    for part in pieces(records.length[indices], most, BATCH):
        encoded = [read_picture(records, index) for index in indices[part].tolist()]
        for piece in pieces(decoded_sizes(encoded), most):
            yield indices[part][piece], encoded[piece]


def decoded_sizes(encoded: Sequence[Bytes]) -> Ints:
    """Bytes of pictures once they are decoded, [n], by their headers."""
    shapes = np.array([header_shape(data) for data in encoded], np.int64).reshape(-1, 2)
    sizes: Ints = 3 * shapes.prod(axis=1)
    return sizes


def thumbnails(records: Records, indices: Sequence[int] | Ints, side: int, engine: Engine) -> list[Bytes]:
    """The records at `indices` in that order, each uint8 RGB [h, w, 3] with its longer side resized to `side` pixels.

    Raises:
        UserError: a record cannot be read or decoded; names file and record.
    """

    def small(pictures: DataNode) -> DataNode:
        resized: DataNode = fn.resize(
            pictures,
            size=(side, side),
            mode="not_larger",
            subpixel_scale=False,  # all of the picture, where its shorter side would not be a whole number
            interp_type=types.INTERP_LINEAR,
            antialias=True,
        )
        return resized.cpu()

    chosen = np.asarray(indices, np.int64)
    return [np.array(picture) for _, picture in decoded_pictures(records, chosen, engine, small)]
