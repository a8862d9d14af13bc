"""Batches of normalized pictures: a thread owns the DALI pipeline, reads ahead and hands its memory to torch."""

from __future__ import annotations

import contextlib
import queue
import sys
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, cast

import numpy as np
import torch
from nvidia.dali.backend import TensorCPU
from nvidia.dali.pipeline import Pipeline
from torch.utils.dlpack import from_dlpack

from fastflower.arrays import Ints
from fastflower.data import pipeline as graph
from fastflower.data.decoding import first_undecodable
from fastflower.data.memory import Memory, pageable, pinned
from fastflower.data.on_cpu import CpuBatches
from fastflower.data.reading import Reader, known_sound
from fastflower.data.records import Records
from fastflower.data.resample import Resampler
from fastflower.data.sampler import Request
from fastflower.data.view import Engine, Normalization, View
from fastflower.errors import UserError
from fastflower.runtime.distributed import Ranks

if TYPE_CHECKING:
    from fastflower.data.cache import Decoded


@dataclass(frozen=True)
class Batch:
    """Pictures ready for the network."""

    # [N, 3, H, W] channels-last, normalized: float32, or float16 where DALI normalizes (GPU); else uint8
    images: torch.Tensor
    labels: torch.Tensor  # [N] int64
    indices: Ints  # [N], which records they are


Iteration = Generator[Batch, None, None]  # which `close` leaves


@dataclass(frozen=True)
class Loading:
    """How all pictures of a run are loaded, whichever they are: by what, to where, and for whom."""

    normalization: Normalization | None  # of the pixels; None leaves them uint8, without color shifts
    engine: Engine  # where DALI works; "gpu" needs `device` to be that GPU
    device: torch.device  # where batches are handed out
    ranks: Ranks = field(default_factory=Ranks)  # who share the records


class Loader:
    """Turns requests into batches.

    It may be used for any number of epochs, also for several at once. Each `batches` call starts a thread that is gone
    when the iteration ends or is left.
    """

    def __init__(
        self,
        records: Records,
        view: View,
        batch: int,
        loading: Loading,
        decoded: Decoded | None = None,
    ) -> None:
        """Prepare; the pipeline is built by the first iteration.

        Args:
            records: the split.
            view: geometry of the pictures.
            batch: most pictures in a batch.
            loading: by what and to where; as many finished batches wait for the consumer as the engine has in work.
            decoded: the records' pixels, where they are in memory.
        """
        self.records, self.view, self.batch, self.loading, self.decoded = records, view, batch, loading, decoded
        # noted of each record when it is read first, in whichever iteration
        self.sound, self.shapes = known_sound(records), np.zeros((len(records), 2), np.int64)
        self._device, normalization = loading.device, loading.normalization
        if normalization and self._device.type == "cuda":
            self._mean = 255 * torch.tensor(normalization.mean, device=self._device)
            self._std = 255 * torch.tensor(normalization.std, device=self._device)
        self._idle: deque[_Producer] = deque()  # as many as there were iterations at once

    def batches(self, requests: Iterable[Request]) -> Iteration:
        """A batch for each request, in order; of a request whose pictures are of several shapes, one for each.

        The first ones are made from now on, as many as the engine has in work and may wait; the others as these are
        taken. On a GPU a batch's memory stays valid until the work queued up to the next step but one of the iteration
        is done, and the last one's into the next iteration: a batch may be taken before there is work on the one
        before.

        Raises:
            UserError: in the iteration: a record cannot be read or decoded; names file and record. Earlier batches come
                first.
        """
        begun = self._begin(requests)
        next(begun)
        return cast(Iteration, begun)

    def _begin(self, requests: Iterable[Request]) -> Generator[Batch | None, None, None]:
        """None when the thread has started, since a generator that has not yielded cannot be left; then the batches."""
        try:
            producer = self._idle.pop()
        except IndexError:
            producer = _Producer(self)
        ready: queue.Queue[_Ready] = queue.Queue(maxsize=self.loading.engine.prefetch)
        stop = threading.Event()
        thread = threading.Thread(target=producer.run, args=(iter(requests), ready, stop), name="loader", daemon=True)
        thread.start()
        in_use: deque[tuple[torch.cuda.Event, _Item | None]] = deque()
        try:
            yield None
            while (item := ready.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield self._hand_over(item)
                if self._device.type == "cuda":
                    # memory that we drop is used again at once, so hold it until the consumer's queued work is past it
                    in_use.append((torch.cuda.current_stream(self._device).record_event(), producer.handed_over))
                    producer.handed_over = item
                    while in_use and in_use[0][0].query():
                        in_use.popleft()
        finally:
            stop.set()
            ready.maxsize = sys.maxsize
            if thread is not threading.current_thread():  # in which garbage may be collected, and we be found among it
                with contextlib.suppress(queue.Empty):
                    ready.get_nowait()  # it may be waiting for room
                thread.join()
                if self._device.type == "cuda":
                    torch.cuda.current_stream(self._device).synchronize()
                producer.settle()
                self._idle.append(producer)

    def _hand_over(self, item: _Item) -> Batch:
        images, labels, shift, indices, sent, _ = item
        if sent:
            torch.cuda.current_stream(self._device).wait_event(sent)
        if self._device.type == "cuda" and self.loading.normalization:
            if images.dtype == torch.uint8:
                mean = self._mean if shift is None else self._mean - 255 * shift
                images = normalize(images, mean, self._std)
            elif shift is not None:
                images.add_((255 * shift / self._std)[:, :, None, None])
        return Batch(images, labels, indices)


class _Item(NamedTuple):
    """A batch on its way from the loader thread to the consumer, on the consumer's device."""

    images: torch.Tensor  # [N, 3, H, W]
    labels: torch.Tensor  # [N]
    shift: torch.Tensor | None  # [N, 3], of the colors; on a CPU the images have it already
    indices: Ints  # [N]
    sent: torch.cuda.Event | None  # when all of it is there; None on a CPU
    source: torch.Tensor | None = None  # what the images are copied from, which stays as it is until they are there


_Ready = _Item | Exception | None  # None: that was all


class _Work(NamedTuple):
    """What DALI makes a batch of. It reads the inputs where they are, so they are kept until the batch is made."""

    request: Request
    inputs: graph.Inputs


class _Producer:
    """What makes the batches of one iteration after another, and all that it changes: used by one thread at a time."""

    def __init__(self, loader: Loader) -> None:
        self._records, self._view, self._batch = loader.records, loader.view, loader.batch
        self._loading, self._decoded = loader.loading, loader.decoded
        on_gpu = self._loading.device.type == "cuda"
        self._stream = torch.cuda.Stream(self._loading.device) if on_gpu else None
        self._reader = Reader(self._records, loader.sound, self._loading.engine.threads)
        if self._loading.engine.device == "cpu":
            # for a GPU pictures are left uint8, a quarter in size, and normalized there
            normalization, memory = (None, pinned) if on_gpu else (self._loading.normalization, pageable)
            self._on_cpu = CpuBatches(
                self._records,
                self._view,
                self._batch,
                self._loading.engine,
                Resampler(self._view, normalization, Memory(memory)),
                self._reader,
                loader.shapes,
                self._decoded,
            )
        self._pipeline: Pipeline | None = None
        self._requests: Iterator[Request] = iter(())
        self._in_work: deque[_Work] = deque()
        self._made: deque[tuple[torch.cuda.Event, _Work]] = deque()  # by a GPU, or still being made
        self._failure: UserError | None = None
        self.handed_over: _Item | None = None  # the last one, of which the consumer may not have begun to make use

    def run(self, requests: Iterator[Request], ready: queue.Queue[_Ready], stop: threading.Event) -> None:
        """The loader thread: run the pipeline until the requests end, `stop` is set or something fails."""
        self._requests = _until(requests, stop)
        self._failure = None
        self._in_work.clear()
        try:
            if self._stream:
                torch.cuda.set_device(self._loading.device)  # a thread begins with GPU 0, which may be another rank's
            with torch.cuda.stream(self._stream):
                on_cpu = self._loading.engine.device == "cpu"
                for item in self._by_cpu(stop) if on_cpu else self._by_dali():
                    ready.put(item)
            ready.put(self._failure)
        except Exception as error:
            self._pipeline = None  # after an error its batches no longer match our requests
            ready.put(self._explain(error))

    def settle(self) -> None:
        """Wait until all that was sent has come, also to where nobody took it."""
        if self._stream:
            self._stream.synchronize()

    def _by_cpu(self, stop: threading.Event) -> Iterator[_Item]:
        """Decoded and resampled on a CPU."""
        for images, request in self._on_cpu.batches(self._requests, stop):
            yield self._item(torch.from_numpy(images), request)

    def _by_dali(self) -> Iterator[_Item]:
        """Decoded and resampled by DALI on a GPU."""
        if self._pipeline is None:
            self._pipeline = graph.build_pipeline(
                self._next_inputs,
                self._view,
                self._loading.engine,
                self._batch,
                self._loading.normalization,
                decoded=self._decoded.place if self._decoded else None,
            )
        for (pictures,), request in self._runs(self._pipeline):
            yield from self._to_torch(pictures, request)

    def _runs(self, pipeline: Pipeline) -> Iterator[tuple[tuple[graph.Pictures, ...], Request]]:
        """What the pipeline makes of each request."""
        while True:
            try:
                outputs = pipeline.run(self._stream)
            except StopIteration:
                pipeline.reset()
                return
            work = self._in_work.popleft()
            if self._stream:
                while self._made and self._made[0][0].query():
                    self._made.popleft()
                self._made.append((self._stream.record_event(), work))
            yield outputs, work.request

    def _next_inputs(self) -> graph.Inputs:
        """DALI's source: called on the loader thread, some batches ahead of the outputs."""
        request = next(self._requests, None)
        if request is None:
            raise StopIteration
        try:
            if self._decoded:
                images: graph.Images = [self._decoded.picture(index) for index in request.indices.tolist()]
            else:
                images = [TensorCPU(encoded) for encoded in self._reader.read(request.indices)]
        except UserError as error:
            self._failure = error  # an exception would cross DALI's native code: end the data and raise it after
            raise StopIteration from error
        inputs = graph.inputs(images, request)
        self._in_work.append(_Work(request, inputs))
        return inputs

    def _to_torch(self, pictures: graph.Pictures, request: Request) -> Iterator[_Item]:
        if pictures.is_dense_tensor():
            yield self._item(from_dlpack(pictures.as_tensor()), request)  # the same memory
            return
        shapes = [tuple(shape) for shape in pictures.shape()]
        for shape in sorted(set(shapes)):
            alike = np.array([i for i, other in enumerate(shapes) if other == shape])
            images = torch.stack([from_dlpack(pictures[int(i)]) for i in alike])
            if self._stream:
                self._stream.synchronize()  # DALI uses the memory of its pictures again when we drop them
            yield self._item(images, request.select(alike))

    def _item(self, images: torch.Tensor, request: Request) -> _Item:
        """Pictures [N, H, W, 3] on their way to `device`, where they are [N, 3, H, W] and channels-last."""
        images = images.permute(0, 3, 1, 2)
        labels = torch.from_numpy(self._records.labels[request.indices])
        shift = None if request.shift is None else torch.from_numpy(request.shift)
        if not self._stream:
            return _Item(images, labels, shift, request.indices, None)
        source, images = images, images.to(self._loading.device, non_blocking=True)
        labels = labels.pin_memory().to(self._loading.device, non_blocking=True)
        if shift is not None:
            shift = shift.pin_memory().to(self._loading.device, non_blocking=True)
        return _Item(images, labels, shift, request.indices, self._stream.record_event(), source)

    def _explain(self, error: Exception) -> Exception:
        """The record behind a failed batch: DALI names none, so try all that are in work."""
        indices = np.concatenate([work.request.indices for work in self._in_work] or [np.empty(0, np.int64)])
        try:
            return first_undecodable(self._records, indices) or error
        except UserError as unreadable:  # by now
            return unreadable


def normalize(images: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """(images - mean) / std in float32 of uint8 [N, 3, H, W]; mean, [3] or [N, 3], and std, [3], are in 0..255."""
    return images.float().sub_(mean.view(-1, 3, 1, 1)).div_(std.view(3, 1, 1))


def _until(requests: Iterator[Request], stop: threading.Event) -> Iterator[Request]:
    for request in requests:
        if stop.is_set():
            return
        yield request
