"""Batches that a CPU makes: pictures are read, decoded and resampled in pieces, some of which are ahead of others.

A piece has few enough pictures that its bytes, encoded and decoded, are bounded. What becomes of a picture does not
depend on its piece.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Event
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from nvidia.dali.backend import TensorCPU

from fastflower.arrays import Bytes, Ints
from fastflower.data import pipeline as graph
from fastflower.data.decoding import first_undecodable, undecodable
from fastflower.data.geometry import Frame
from fastflower.data.pieces import pieces
from fastflower.data.reading import Reader
from fastflower.data.records import Records
from fastflower.data.resample import Making, Region, Resampler
from fastflower.data.sampler import Request
from fastflower.data.scaled import Scaled, factors, scaled
from fastflower.data.soundness import header_shape
from fastflower.data.view import Engine, View
from fastflower.errors import UserError

if TYPE_CHECKING:
    from fastflower.data.cache import Decoded


@dataclass
class _Piece:
    """Pictures of a batch that are in work."""

    making: Making
    places: Ints  # [m] of those that DALI decodes, in the batch
    last: bool  # of its batch
    inputs: graph.Inputs | None  # what DALI decodes, which reads it where it is
    tasks: list[Future[None]] = field(default_factory=list)  # of the others


class CpuBatches:
    """Makes the batches of one iteration after another; used by one thread at a time."""

    def __init__(
        self,
        records: Records,
        view: View,
        batch: int,
        engine: Engine,
        resampler: Resampler,
        reader: Reader,
        shapes: Ints,
        decoded: Decoded | None = None,
    ) -> None:
        """Prepare.

        Args:
            records: the split.
            view: geometry.
            batch: most pictures in a batch.
            engine: resources.
            resampler: of the view.
            reader: of the records.
            shapes: heights and widths by the pictures' headers, [n, 2], which are noted there when a picture comes
                first; 0 until then.
            decoded: the records' pixels, where they are in memory.
        """
        self._records, self._view, self._batch, self._engine = records, view, batch, engine
        self._resampler, self._reader, self._shapes, self._decoded = resampler, reader, shapes, decoded
        self._decoder: graph.Decoder | None = None

    def batches(self, requests: Iterator[Request], stop: Event) -> Iterator[tuple[NDArray[Any], Request]]:
        """Pictures [n, h, w, 3] and what was asked of them; of a request one for each shape that comes out.

        When `stop` is set, what is in work is finished and the rest is left.

        Raises:
            UserError: a record cannot be read or decoded; names file and record. Earlier batches come first.
        """
        most = 1 if self._decoded else self._engine.prefetch + 1
        in_work: deque[_Piece] = deque()
        failure: Exception | None = None
        with ThreadPoolExecutor(self._engine.threads, "resample") as threads:
            begun = self._begun(requests, threads)
            try:
                while True:
                    while not failure and not stop.is_set() and len(in_work) < most:
                        try:
                            in_work.append(next(begun))
                        except StopIteration:
                            break
                        except Exception as error:
                            failure = error
                    if not in_work:
                        break
                    yield from self._finish(in_work[0], threads)
                    in_work.popleft()
            finally:
                if in_work:
                    self._decoder = None  # it would give what it has begun to the next iteration
        if failure:
            raise failure

    def _begun(self, requests: Iterator[Request], threads: Executor) -> Iterator[_Piece]:
        """The pieces of all batches, as each is read and its work begins."""
        for request in requests:
            making = self._resampler.begin(request)
            if self._decoded:
                regions = [self._decoded.region(index) for index in request.indices.tolist()]
                tasks = making.add(np.arange(len(request)), _shapes(regions), _one_of(regions), threads)
                yield _Piece(making, np.empty(0, np.int64), True, None, tasks)
                continue
            for part in pieces(self._reader.sizes(request.indices), self._engine.piece):
                encoded = self._reader.read(request.indices[part])
                sizes, small = self._sizes(request.indices[part], encoded)
                for piece in pieces(sizes, self._engine.piece):
                    places = np.arange(part.start + piece.start, part.start + piece.stop)
                    last = places[-1] == len(request) - 1
                    yield self._begin(making, places, encoded[piece], small[piece], threads, last=bool(last))

    def _sizes(self, indices: Ints, encoded: Sequence[Bytes]) -> tuple[Ints, list[Scaled | None]]:
        """Of each picture the bytes that are in memory at once, [m], and how it is decoded smaller, if it is."""
        shapes = self._shapes[indices]
        for i in np.flatnonzero(shapes[:, 0] == 0).tolist():
            self._shapes[indices[i]] = shapes[i] = header_shape(encoded[i])
        small: list[Scaled | None] = [None] * len(indices)
        sizes: Ints = 3 * shapes.prod(axis=1)
        if self._engine.decode == "scaled":
            chosen = factors(shapes, self._view.largest)
            for i in np.flatnonzero(chosen > 1).tolist():
                small[i] = scaled(encoded[i], tuple(shapes[i].tolist()), int(chosen[i]))
                if small[i]:
                    sizes[i] = 0  # a thread has one at a time
        return sizes + np.array([len(data) for data in encoded]), small

    def _begin(
        self,
        making: Making,
        places: Ints,
        encoded: Sequence[Bytes],
        small: Sequence[Scaled | None],
        threads: Executor,
        *,
        last: bool,
    ) -> _Piece:
        by_dali = np.array([way is None for way in small])
        piece = _Piece(making, places[by_dali], last, None)
        request = making.request
        if by_dali.any():
            images = [TensorCPU(data) for data, way in zip(encoded, small, strict=True) if way is None]
            piece.inputs = graph.inputs(images, request.select(piece.places))
            if self._decoder is None:
                self._decoder = graph.Decoder(self._view, self._engine, self._batch)
            self._decoder.begin(piece.inputs)
        ways = [(way, data) for way, data in zip(small, encoded, strict=True) if way]
        if ways:
            others = places[~by_dali]

            def region_of(i: int, frame: Frame) -> Region:
                way, data = ways[i]
                try:
                    return way.region(way.decode(data, frame))
                except ValueError as error:
                    raise undecodable((self._records, int(request.indices[others[i]]))) from error

            shapes = np.array([way.shape for way, _ in ways])
            piece.tasks += making.add(others, shapes, region_of, threads, at_once=1)
        return piece

    def _finish(self, piece: _Piece, threads: Executor) -> Iterator[tuple[NDArray[Any], Request]]:
        """Wait for a piece, and give out its batch if it was the last one."""
        if piece.inputs:
            assert self._decoder
            try:
                pixels, corners, shapes = self._decoder.take()
            except RuntimeError as error:  # it names no record
                raise self._explained(piece, error) from error
            corner, shape = (np.asarray(numbers.as_tensor()) for numbers in (corners, shapes))
            corners_and_shapes = zip(corner.tolist(), shape.tolist(), strict=True)
            regions = [Region(np.asarray(pixels[i]), tuple(c), tuple(s)) for i, (c, s) in enumerate(corners_and_shapes)]
            piece.tasks += piece.making.add(piece.places, shape.astype(np.int64), _one_of(regions), threads)
        for task in piece.tasks:
            task.result()
        if piece.last:
            for images, alike in piece.making.finish():
                yield images, piece.making.request.select(alike)

    def _explained(self, piece: _Piece, error: Exception) -> Exception:
        try:
            return first_undecodable(self._records, piece.making.request.indices[piece.places]) or error
        except UserError as unreadable:  # by now
            return unreadable


def _one_of(regions: Sequence[Region]) -> Callable[[int, Frame], Region]:
    return lambda i, _: regions[i]


def _shapes(regions: Sequence[Region]) -> Ints:
    return np.array([region.shape for region in regions], np.int64)
