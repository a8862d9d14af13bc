"""Pictures made on the CPU for a GPU: sent from pinned memory, which nobody writes to until they have come.

The GPU is a stand-in that copies as late as it may: a copy that is not waited for reads what is in its source by then.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from fastflower.arrays import Bytes
from fastflower.data import loader
from fastflower.data.loader import Batch, Loader, Loading
from fastflower.data.records import Records
from fastflower.data.sampler import evaluation_requests
from fastflower.data.sources.kaggle import load_split
from fastflower.data.view import Engine, View
from tests.conftest import write_dataset

GPU = torch.device("cuda", 0)
COUNT, BATCH = 48, 4


class Stream:
    """Work in order, which is done when it is waited for, or `behind` events later."""

    behind = 3

    def __init__(self, *_: object) -> None:
        self._work: deque[Callable[[], object]] = deque()
        self._events: deque[Event] = deque()
        self._lock = threading.RLock()

    def add(self, work: Callable[[], object]) -> None:
        with self._lock:
            self._work.append(work)

    def record_event(self) -> Event:
        event = Event(self)
        with self._lock:
            self._work.append(event.reach)
            self._events.append(event)
        return event

    def wait_event(self, event: Event) -> None:
        self.add(event.synchronize)

    def synchronize(self) -> None:
        with self._lock:
            while self._work:
                self._work.popleft()()

    def work_until(self, event: Event) -> None:
        with self._lock:
            while not event.reached:
                self._work.popleft()()

    def newer_than(self, event: Event) -> int:
        with self._lock:
            return len(self._events) - 1 - self._events.index(event)

    @property
    def idle(self) -> bool:
        return not self._work


class Event:
    def __init__(self, stream: Stream) -> None:
        self._stream, self.reached = stream, False

    def reach(self) -> None:
        self.reached = True

    def query(self) -> bool:
        if self._stream.newer_than(self) >= Stream.behind:
            self.synchronize()
        return self.reached

    def synchronize(self) -> None:
        self._stream.work_until(self)


class Cuda:
    """What the loader asks of torch.cuda."""

    def __init__(self) -> None:
        self.consumers, self.loaders = Stream(), list[Stream]()
        self.pinned: list[Bytes] = []
        self.sent_from: list[int] = []
        self.targets: list[torch.Tensor] = []
        self._of_thread = threading.local()

    def new_stream(self, *_: object) -> Stream:
        self.loaders.append(Stream())
        return self.loaders[-1]

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        self._of_thread.stream = stream
        yield

    def current_stream(self, *_: object) -> Stream:
        return getattr(self._of_thread, "stream", self.consumers)

    def allocate(self, size: int) -> Bytes:
        self.pinned.append(np.empty(size, np.uint8))
        return self.pinned[-1]

    def send(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of the GPU, whose values come when the stream is that far."""
        target = torch.zeros_like(tensor)
        if tensor.ndim != 4:  # torch's own pinned memory, which waits for what copies from it
            self.current_stream().add(lambda: target.copy_(tensor))
            return target
        source, to, size = tensor.data_ptr(), target.data_ptr(), tensor.nbytes
        self.sent_from.append(source)
        self.targets.append(target)
        self.current_stream().add(lambda: ctypes.memmove(to, source, size))  # it keeps no memory from being used again
        return target


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    cuda = Cuda()
    monkeypatch.setattr(torch.cuda, "Stream", cuda.new_stream)
    monkeypatch.setattr(torch.cuda, "stream", cuda.stream)
    monkeypatch.setattr(torch.cuda, "current_stream", cuda.current_stream)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *_, **__: cuda.send(tensor))
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)
    monkeypatch.setattr(loader, "pinned", cuda.allocate)
    return cuda


@pytest.fixture
def records(tmp_path: Path) -> Records:
    return load_split(write_dataset(tmp_path, {"val": COUNT}), "val")


def batches(records: Records, device: torch.device) -> Iterator[Batch]:
    made = Loader(records, View(32), BATCH, Loading(None, Engine(), device))
    return made.batches(evaluation_requests(COUNT, shorter=36, batch=BATCH))


def test_pictures_are_sent_from_few_pinned_buffers_that_wait_for_their_copies(records: Records, cuda: Cuda) -> None:
    wanted = [batch.images for batch in batches(records, torch.device("cpu"))]
    came: list[torch.Tensor] = []
    for batch in batches(records, GPU):
        copy = torch.zeros_like(batch.images)
        cuda.current_stream().add(partial(copy.copy_, batch.images))  # as the network reads it
        came.append(copy)
    cuda.consumers.synchronize()
    assert len(came) == len(wanted) == COUNT // BATCH
    for images, other in zip(came, wanted, strict=True):
        assert torch.equal(images, other)
    buffers = {memory.ctypes.data for memory in cuda.pinned}
    assert set(cuda.sent_from) <= buffers
    assert len(cuda.sent_from) == len(wanted)
    # those that the consumer's stream has not passed, those that wait, one that is made and one that is handed over
    assert len(buffers) <= Stream.behind + Engine().prefetch + 3 < len(wanted)


def test_nothing_is_under_way_when_an_iteration_is_left(records: Records, cuda: Cuda) -> None:
    for taken in range(4):
        iteration = iter(batches(records, GPU))
        for _ in range(taken):
            next(iteration)
        iteration.close()  # type: ignore[attr-defined]
        assert cuda.consumers.idle
        assert all(stream.idle for stream in cuda.loaders)
