"""The DALI graph for a GPU without one: it is defined and serialized, and run on the CPU."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastflower.data import pipeline as graph
from fastflower.data.cache import Decoded, open_cache
from fastflower.data.loader import Batch, Loader, Loading
from fastflower.data.pipeline import in_two
from fastflower.data.records import Records
from fastflower.data.sampler import training_requests
from fastflower.data.sources.kaggle import load_split
from fastflower.data.sources.tfrecord import write_tfrecord
from fastflower.data.view import IMAGENET, Engine, Normalization, View
from fastflower.errors import UserError
from fastflower.runtime.distributed import Ranks
from tests.conftest import example, jpeg
from tests.data.on_the_cpu import run_on_the_cpu

CPU = torch.device("cpu")
COUNT, BATCH = 22, 4


@pytest.fixture
def records(tmp_path: Path) -> Records:
    """Pictures of many shapes, wide ones and tall ones."""
    shapes = np.random.default_rng(0).integers(40, 90, (COUNT, 2)).tolist()
    images = [jpeg(width, height, seed) for seed, (width, height) in enumerate(shapes)]
    write_tfrecord(tmp_path / "train" / "a.tfrec", [example(i, i % 3, image) for i, image in enumerate(images)])
    return load_split(tmp_path, "train")


def on_the_gpu(records: Records) -> Decoded:
    """The pixels as `data.cache gpu` keeps them, in memory of torch."""
    (kept,) = open_cache("ram", [records], Engine(), Ranks(), lambda _: None, lambda _: lambda done, total: None)
    assert kept
    assert isinstance(kept.pixels, np.ndarray)
    decoded = Decoded(kept.shapes, kept.starts, torch.from_numpy(kept.pixels))
    assert decoded.place == "gpu"
    return decoded


def loader(records: Records, decoded: Decoded | None, prefetch: int = 2, place: Any = "random") -> Loader:
    loading = Loading(IMAGENET, Engine("gpu", None, prefetch=prefetch), CPU)
    return Loader(records, View(32, place), BATCH, loading, decoded)


def epoch(loader: Loader, number: int) -> Iterator[Batch]:
    requests = training_requests(len(loader.records), seed=0, epoch=number, scale=(36, 48), global_batch=loader.batch)
    return loader.batches(requests)


@pytest.mark.filterwarnings("ignore:The external source node")  # only a random crop has a use for all numbers
@pytest.mark.parametrize("decoded", [None, "cpu", "gpu"])
@pytest.mark.parametrize("normalization", [None, IMAGENET], ids=["levels", "normalized"])
@pytest.mark.parametrize("place", ["random", "center", "whole"])
def test_every_graph_is_defined_and_serialized(
    place: Any, normalization: Normalization | None, decoded: Literal["cpu", "gpu"] | None
) -> None:
    pipeline = graph._definition(
        lambda: None,
        View(224, place),
        Engine("gpu", None),
        normalization,
        decoded,
        batch_size=4,
        num_threads=1,
        device_id=None,
        prefetch_queue_depth=2,
    )
    assert len(pipeline.serialize()) > 1000


@dataclass
class Part:
    """An epoch of a source: how many batches, and whether what comes after them is the end or a mistake."""

    batches: int
    mistake: bool


@given(
    st.lists(st.builds(Part, st.integers(0, 4), st.booleans()), min_size=1, max_size=5),
    st.lists(st.permutations([0, 1]), min_size=40, max_size=40),
)
def test_a_source_in_two_gives_both_halves_of_each_batch_and_ends_in_both(
    epochs: list[Part], orders: list[list[int]]
) -> None:
    """In whichever order they are asked, as DALI asks: the second one also where the first one has ended."""
    script = iter([batch for part in epochs for batch in [*range(part.batches), part]])
    asked = 0

    def source() -> Any:
        nonlocal asked
        asked += 1
        batch = next(script)
        if isinstance(batch, Part):
            raise StopIteration from (UserError("unreadable") if batch.mistake else None)
        return [batch], batch, batch, batch

    halves, order = in_two(source), iter(orders)
    for part in epochs:
        for batch in range(part.batches + 1):
            answers: list[Any] = [None, None]
            for half in next(order):
                try:
                    answers[half] = halves[half]()
                except StopIteration:
                    answers[half] = "end"
            assert answers == (["end", "end"] if batch == part.batches else [[batch], (batch, batch, batch)])
    assert asked == sum(part.batches + 1 for part in epochs)


@pytest.mark.parametrize("prefetch", [1, 2, 3, 4])
def test_pictures_decoded_before_make_the_same_batches_over_epochs_and_after_those_left_early(
    records: Records, prefetch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_on_the_cpu(monkeypatch)
    cached, anew = loader(records, on_the_gpu(records), prefetch), loader(records, None, prefetch)
    for number in range(6):
        steps = number % 4 if number < 4 else None  # 0: left before the first; None: to its end
        for one, other in itertools.islice(zip(epoch(cached, number), epoch(anew, number), strict=True), steps):
            assert one.indices.tolist() == other.indices.tolist()
            assert one.images.dtype == torch.float16
            assert torch.equal(one.images, other.images)
        whole = list(epoch(cached, number))
        assert [len(batch.labels) for batch in whole] == [BATCH] * (COUNT // BATCH)
        assert all(torch.equal(a.images, b.images) for a, b in zip(whole, epoch(anew, number), strict=True))


def test_an_epoch_that_a_mistake_ends_leaves_the_loader_usable(
    records: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_on_the_cpu(monkeypatch)
    cached = loader(records, on_the_gpu(records), prefetch=3)
    wanted = [batch.images for batch in epoch(cached, 0)]
    third = next(itertools.islice(epoch(cached, 0), 3, None)).indices[0]
    picture = Decoded.picture

    def lost(decoded: Decoded, index: int) -> Any:
        if index == third:
            raise UserError("its memory is gone")
        return picture(decoded, index)

    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr(Decoded, "picture", lost)
            before: list[torch.Tensor] = []
            with pytest.raises(UserError, match="its memory is gone"):
                before.extend(batch.images for batch in epoch(cached, 0))
        after = [batch.images for batch in epoch(cached, 0)]
        assert len(after) == len(wanted)
        assert all(torch.equal(one, other) for one, other in zip(after, wanted, strict=True))
