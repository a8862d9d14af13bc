"""What a GPU still works on is held: the bytes that it decodes, and a batch until the work on it is queued."""

from __future__ import annotations

import weakref
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch

from fastflower.data.cache import Decoded
from fastflower.data.loader import Loader, Loading, _Item, _Producer
from fastflower.data.memory import pageable
from fastflower.data.sampler import Request, evaluation_requests
from fastflower.data.sources.kaggle import load_split
from fastflower.data.view import Engine, View
from tests.data.test_loader import _stored

GPU = torch.device("cuda", 0)  # which is not there, and is done at once with what it is given


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[torch.Tensor]]:
    """The pictures of all batches, as long as somebody holds them."""
    for name in ("Stream", "stream", "set_device", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    monkeypatch.setattr("fastflower.data.loader.pinned", pageable)
    refs: list[weakref.ref[torch.Tensor]] = []

    def item(producer: _Producer, images: torch.Tensor, request: Request) -> _Item:
        images = images.clone()
        refs.append(weakref.ref(images))
        return _Item(images, torch.zeros(len(request)), None, request.indices, None)

    monkeypatch.setattr(_Producer, "_item", item)
    return refs


def test_memory_is_held_until_the_consumer_has_had_time_to_make_use_of_it(
    small: Path, made: list[weakref.ref[torch.Tensor]]
) -> None:
    decoded = Decoded(np.full((20, 2), 40), np.zeros(20, np.int64), np.zeros(3 * 40 * 40, np.uint8))
    loader = Loader(load_split(small, "val"), View(32), 5, Loading(None, Engine(), GPU), decoded)
    for _ in range(2):
        before = len(made)  # now, since the loader begins when it is asked
        batches = loader.batches(evaluation_requests(20, shorter=36, batch=5))
        for taken in range(1, 5):
            next(batches)
            last = made[before + taken - 1]
            assert last() is not None
            if taken > 1:
                assert made[before + taken - 2]() is not None, "there may be no work on it yet"
            assert all(older() is None for older in made[: before + taken - 2][:-1]), "and there is on these"
        assert next(batches, None) is None
        assert last() is not None, "it is the last one, on which there may be no work yet"


class LaterEvent:
    """Of a stream of a GPU: queried, it says whether the test lets the work before it be done."""

    done = False

    def query(self) -> bool:
        return self.done


def test_a_gpu_has_what_it_decodes_until_it_is_done(small: Path) -> None:
    """By a stand-in for its stream, whose batches are handed out before they are made."""
    producer = _Producer(
        Loader(load_split(small, "train"), View(32), 8, Loading(None, Engine(device="gpu"), torch.device("cpu")))
    )
    requests = [_stored([3 * i, 3 * i + 1, 3 * i + 2]) for i in range(5)]
    producer._requests = iter(requests)
    freed: list[int] = []
    events: list[LaterEvent] = []

    class Stream:
        def record_event(self) -> LaterEvent:
            events.append(LaterEvent())
            return events[-1]

    class Pipeline:
        def run(self, _: object) -> tuple[()]:
            number = len(events)
            images, *_numbers = producer._next_inputs()
            weakref.finalize(images[0], freed.append, number)
            return ()

        def reset(self) -> None:
            pass

    producer._stream = Stream()  # type: ignore[assignment]
    made = producer._runs(Pipeline())
    assert [next(made)[1] for _ in range(3)] == requests[:3]
    assert freed == []
    events[0].done = events[2].done = True  # in order, as on a stream
    next(made)
    assert freed == [0]
    events[1].done = True
    next(made)
    assert freed == [0, 1, 2]
    assert next(made, None) is None
