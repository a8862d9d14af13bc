"""On a GPU a batch's memory is held until the work on it is queued, though the next batch may be taken before."""

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
        batches, before = loader.batches(evaluation_requests(20, shorter=36, batch=5)), len(made)
        for taken in range(1, 5):
            next(batches)
            last = made[before + taken - 1]
            assert last() is not None
            if taken > 1:
                assert made[before + taken - 2]() is not None, "there may be no work on it yet"
            assert all(older() is None for older in made[: before + taken - 2][:-1]), "and there is on these"
        assert next(batches, None) is None
        assert last() is not None, "it is the last one, on which there may be no work yet"
