"""The loader thread: what it hands over, in which order, and how it fails."""

from __future__ import annotations

import functools
import subprocess
import sys
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.ExifTags import Base

from fastflower.arrays import Bytes, Ints
from fastflower.config import DataConfig
from fastflower.data import pipeline as graph
from fastflower.data.geometry import Frame
from fastflower.data.loader import Batch, Loader, Loading, normalize
from fastflower.data.memory import Memory
from fastflower.data.records import Records, read_image
from fastflower.data.resample import Making, Region
from fastflower.data.sampler import Request, evaluation_requests, training_requests
from fastflower.data.sources import layout_of
from fastflower.data.sources.kaggle import load_split
from fastflower.data.sources.tfrecord import write_tfrecord
from fastflower.data.view import IMAGENET, Engine, Normalization, View
from tests.conftest import example, jpeg, write_dataset

CPU = torch.device("cpu")
PLAIN = Normalization((0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255))  # leaves 0..255


def loader(records: Records, view: View, batch: int, **engine: int) -> Loader:
    return Loader(records, view, batch, Loading(PLAIN, Engine(**engine), CPU))  # type: ignore[arg-type]


def epoch(loader: Loader, number: int = 0, batch: int = 8, start: int = 0, seed: int = 0) -> list[Batch]:
    requests = training_requests(
        len(loader.records), seed=seed, epoch=number, scale=(36, 48), global_batch=batch, start=start
    )
    return list(loader.batches(requests))


def test_batches_are_channels_last_floats_in_dalis_own_order(small: Path) -> None:
    records = load_split(small, "train")
    for batch in epoch(loader(records, View(32, "random"), 8)):
        assert batch.images.shape == (8, 3, 32, 32)
        assert batch.images.dtype == torch.float32
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        assert batch.labels.tolist() == records.labels[batch.indices].tolist()


def test_pictures_belong_to_their_labels(small: Path) -> None:
    """The fixture's pictures are brighter the higher their class."""
    records = load_split(small, "train")
    for batch in epoch(loader(records, View(32, "random"), 8)):
        brightness = batch.images.mean((1, 2, 3)).numpy()
        assert np.abs(brightness - (49.5 + 40 * batch.labels.numpy())).max() < 12


def test_pictures_are_not_copied_between_decoder_and_resampler(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    owners: list[bool] = []
    original = Making.add

    def spy(self: Making, places: Ints, shapes: Ints, region_of: Callable[[int, Frame], Region], *others: Any) -> Any:
        owners.extend(region_of(i, Frame(0, 0, 0, 0, 0, 0)).pixels.flags.owndata for i in range(len(places)))
        return original(self, places, shapes, region_of, *others)

    monkeypatch.setattr(Making, "add", spy)
    epoch(loader(load_split(small, "train"), View(32, "random"), 8))
    assert owners == [False] * 48


def test_held_batches_are_not_overwritten_by_later_ones(small: Path) -> None:
    made = loader(load_split(small, "train"), View(32, "random"), 8, prefetch=1)
    held = epoch(made)
    again = [batch.images.clone() for batch in made.batches(_requests(made))]
    for batch, images in zip(held, again, strict=True):
        assert torch.equal(batch.images, images)


def _requests(made: Loader, start: int = 0) -> Iterator[Request]:
    return training_requests(len(made.records), seed=0, epoch=0, scale=(36, 48), global_batch=8, start=start)


@pytest.mark.parametrize(("threads", "prefetch"), [(1, 1), (2, 3)])
def test_pixels_do_not_depend_on_threads_prefetch_or_where_the_epoch_starts(
    small: Path, threads: int, prefetch: int
) -> None:
    records = load_split(small, "train")
    whole = epoch(loader(records, View(32, "random"), 8), 3)
    other = epoch(loader(records, View(32, "random"), 8, threads=threads, prefetch=prefetch), 3, start=16)
    for a, b in zip(whole[2:], other, strict=True):
        assert torch.equal(a.images, b.images)
        assert a.indices.tolist() == b.indices.tolist()


@pytest.mark.parametrize("place", ["random", "center", "whole"])
def test_pixels_do_not_depend_on_what_of_a_picture_is_decoded(tmp_path: Path, place: Any) -> None:
    """Of drawn shapes, turned by EXIF in all ways, with subsampled chroma."""
    rng, images = np.random.default_rng(0), []
    for seed in range(24):
        width, height, turned = rng.integers([20, 20, 1], [120, 120, 9]).tolist()
        picture = Image.open(BytesIO(jpeg(width, height, seed)))
        exif, buffer = picture.getexif(), BytesIO()
        exif[Base.Orientation] = turned
        picture.save(buffer, "JPEG", exif=exif)
        images.append(buffer.getvalue())
    write_tfrecord(tmp_path / "train" / "a.tfrec", [example(i, 0, image) for i, image in enumerate(images)])
    records = load_split(tmp_path, "train")
    of_regions, of_whole = (
        epoch(Loader(records, View(32, place), 8, Loading(PLAIN, Engine(decode=decode), CPU)))
        for decode in ("region", "whole")
    )
    for one, other in zip(of_regions, of_whole, strict=True):
        assert torch.equal(one.images, other.images)


def test_two_ranks_see_the_pixels_of_one(small: Path) -> None:
    records = load_split(small, "train")
    alone = epoch(loader(records, View(32, "random"), 8))
    shares = []
    for rank in range(2):
        requests = training_requests(48, seed=0, epoch=0, scale=(36, 48), global_batch=8, rank=rank, world_size=2)
        shares.append(list(loader(records, View(32, "random"), 4).batches(requests)))
    for whole, left, right in zip(alone, *shares, strict=True):
        assert torch.equal(whole.images, torch.cat((left.images, right.images)))


def test_one_picture_is_seen_differently_each_time(tmp_path: Path) -> None:
    image = jpeg(40, 40)
    write_tfrecord(tmp_path / "train" / "a.tfrec", [example(i, 0, image) for i in range(16)])
    made = loader(load_split(tmp_path, "train"), View(32, "random"), 16)
    first, second, again = (epoch(made, n, 16)[0].images for n in (0, 1, 0))
    views = {picture.numpy().tobytes() for picture in torch.cat((first, second))}
    assert len(views) >= 30  # of some thousand views, two may be the same by chance
    assert torch.equal(first, again)


def test_every_epoch_has_its_length_after_one_was_left_early(small: Path) -> None:
    made = loader(load_split(small, "train"), View(32, "random"), 8)
    complete = [batch.indices.tolist() for batch in epoch(made)]
    for _ in range(3):
        batches = made.batches(_requests(made))
        assert next(batches).indices.tolist() == complete[0]
        assert next(batches).indices.tolist() == complete[1]
        batches.close()
    assert [batch.indices.tolist() for batch in epoch(made)] == complete
    assert not [thread for thread in threading.enumerate() if thread.name == "loader"]


def test_batches_are_made_before_the_first_one_is_taken(small: Path) -> None:
    made, asked = loader(load_split(small, "train"), View(32, "random"), 8), threading.Event()

    def requests() -> Iterator[Request]:
        asked.set()
        yield from _requests(made)

    batches = made.batches(requests())
    assert asked.wait(60)
    assert len(list(batches)) == 6
    left = made.batches(_requests(made))
    left.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "loader"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Records:
    root = tmp_path_factory.mktemp("pictures")
    write_tfrecord(root / "val" / "a.tfrec", [example(i, i % 3, jpeg(40, 44, seed=i)) for i in range(23)])
    return load_split(root, "val")


@settings(deadline=None, max_examples=40)
@given(
    orders=st.lists(st.lists(st.integers(0, 22), min_size=1, max_size=30), min_size=2, max_size=4),
    sizes=st.lists(st.integers(1, 8), min_size=4, max_size=4),
    turns=st.lists(st.tuples(st.integers(0, 3), st.sampled_from(["next", "next", "next", "leave"])), max_size=40),
)
def test_iterations_that_are_open_at_once_do_not_disturb_each_other(
    pictures: Records, orders: list[list[int]], sizes: list[int], turns: list[tuple[int, str]]
) -> None:
    """In any order of turns, of the same or other requests, some left early: each picture is that of its index."""
    made = _shared_loader(pictures)
    asked = [
        [order[i : i + size] for i in range(0, len(order), size)] for order, size in zip(orders, sizes, strict=False)
    ]
    open_ones = [made.batches(map(_stored, batches)) for batches in asked]
    left = {number: iter(batches) for number, batches in enumerate(asked)}
    for number, action in [*turns, *((number, "rest") for number in range(len(asked)))]:
        if number not in left:
            continue
        if action == "leave":
            open_ones[number].close()
            del left[number]
            continue
        for wanted in left[number] if action == "rest" else [next(left[number], None)]:
            batch = next(open_ones[number], None)
            assert (batch.indices.tolist() if batch else None) == wanted
            if batch and wanted:
                assert batch.labels.tolist() == pictures.labels[wanted].tolist()
                for index, image in zip(wanted, batch.images, strict=True):
                    assert np.array_equal(image.permute(1, 2, 0).numpy(), _middle(pictures, index)), (number, index)
        if action == "rest":
            assert next(open_ones[number], None) is None
    assert not [thread for thread in threading.enumerate() if thread.name == "loader"]


@functools.cache
def _middle_of(encoded: bytes) -> Bytes:
    with Image.open(BytesIO(encoded)) as picture:
        left, top = (round((side - 32) / 2) for side in picture.size)
        return np.asarray(picture.crop((left, top, left + 32, top + 32)))


def _middle(records: Records, index: int) -> Bytes:
    """The center by another decoder."""
    return _middle_of(read_image(records, index).tobytes())


def _stored(indices: list[int]) -> Request:
    """The center of stored pictures."""
    n = len(indices)
    return Request(np.array(indices), None, np.full((n, 2), 0.5, np.float32), np.zeros(n, np.int32))


_loaders: dict[int, Loader] = {}


def _shared_loader(records: Records) -> Loader:
    """One for all examples, so that what one leaves behind meets the next."""
    return _loaders.setdefault(id(records), loader(records, View(32), 8))


@pytest.mark.parametrize("layout", ["TFRecords", "folders"])
def test_pictures_stay_as_they_are_read_while_they_are_decoded(tmp_path: Path, layout: str) -> None:
    """Of drawn sizes, with as little read ahead as can be and more, against another decoder; freed memory is wiped."""
    rng = np.random.default_rng(0)
    sides = rng.integers(32, 400, (40, 2)).tolist()
    encoded = [jpeg(width, height, seed=i) for i, (width, height) in enumerate(sides)]
    if layout == "TFRecords":
        write_tfrecord(tmp_path / "train" / "a.tfrec", [example(i, 0, image) for i, image in enumerate(encoded)])
    else:
        (tmp_path / "train" / "rose").mkdir(parents=True)
        for i, image in enumerate(encoded):
            (tmp_path / "train" / "rose" / f"{i:02}.jpg").write_bytes(image)
    records = layout_of(tmp_path).load(tmp_path, "train", DataConfig()).records
    with pytest.MonkeyPatch.context() as patch:
        threads: list[str] = []
        patch.setattr("fastflower.data.reading.Memory", partial(Wiped, threads))
        patch.setattr("fastflower.data.reading.KEPT_OPEN", int(rng.integers(2)))
        for cores, prefetch in ((1, 1), (2, 1), (2, 2), (1, 3)):
            made = loader(records, View(32), 9, threads=cores, prefetch=prefetch)
            for _ in range(6):
                asked = [rng.integers(0, 40, size).tolist() for size in rng.integers(1, 10, 8)]
                for wanted, batch in zip(asked, made.batches(map(_stored, asked)), strict=True):
                    for index, image in zip(wanted, batch.images, strict=True):
                        assert np.array_equal(image.permute(1, 2, 0).numpy(), _middle_of(encoded[index])), index
    assert set(threads) <= {"loader", "MainThread"}, "DALI's would wait for Python's lock"
    assert len(threads) > 150


class Wiped(Memory):
    """Memory that nobody may read once it is free."""

    def __init__(self, threads: list[str]) -> None:
        """`threads` gets the names of those in which memory becomes free."""
        super().__init__()

        class Free(deque[Bytes]):
            def append(self, memory: Bytes) -> None:
                threads.append(threading.current_thread().name)
                memory[:] = 0
                super().append(memory)

        self._free = Free()


def test_one_iteration_after_another_uses_one_pipeline(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[int] = []
    original = graph.Decoder

    def build(*arguments: Any) -> Any:
        built.append(1)
        return original(*arguments)

    monkeypatch.setattr(graph, "Decoder", build)
    made = loader(load_split(small, "train"), View(32, "random"), 8)
    for number in range(3):
        epoch(made, number)
        next(made.batches(_requests(made)))
    assert len(built) == 1
    first, second = made.batches(_requests(made)), made.batches(_requests(made))
    next(first), next(second)
    del first, second
    epoch(made)
    assert len(built) == 2


def test_an_iteration_may_be_collected_as_garbage_by_its_own_thread(small: Path) -> None:
    made = loader(load_split(small, "train"), View(32, "random"), 8)
    opened: list[Any] = []
    closed = threading.Event()

    def requests() -> Iterator[Request]:
        for number, request in enumerate(_requests(made)):
            yield request
            if number == 3:  # in the loader thread, when the first batches have been handed out
                waiting.wait()
                opened.pop().close()
                closed.set()

    waiting = threading.Event()
    opened.append(made.batches(requests()))
    next(opened[0])
    (thread,) = (thread for thread in threading.enumerate() if thread.name == "loader")
    waiting.set()
    thread.join(60)  # it ends, with nobody to take its batches
    assert closed.is_set()
    assert not thread.is_alive()
    assert len(epoch(made)) == 6


@pytest.mark.parametrize(("count", "batch"), [(10, 3), (9, 8), (5, 8), (1, 1)])
def test_evaluation_sees_every_record_once(tmp_path: Path, count: int, batch: int) -> None:
    records = load_split(write_dataset(tmp_path, {"val": count}), "val")
    made = loader(records, View(32), batch)
    for _ in range(2):
        batches = list(made.batches(evaluation_requests(count, shorter=36, batch=batch)))
        assert np.concatenate([b.indices for b in batches]).tolist() == list(range(count))
        assert [len(b.labels) for b in batches] == [len(b.images) for b in batches]


def test_the_pipeline_warns_of_nothing(small: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = loader(load_split(small, "train"), View(32), 8)
        list(made.batches(evaluation_requests(48, shorter=36, batch=8)))


def test_color_shift_is_added_to_each_picture(small: Path) -> None:
    records = load_split(small, "train")
    made = Loader(records, View(32, "random"), 8, Loading(IMAGENET, Engine(), CPU))
    requests = partial(training_requests, 48, seed=0, epoch=0, scale=(36, 48), global_batch=8)
    lighting = np.diag([0.2, 0.3, 0.1])
    std = np.array(IMAGENET.std, np.float32)
    asked = list(requests(lighting=lighting))
    passes = list(made.batches(requests())), list(made.batches(asked))
    for plain, shifted, request in zip(*passes, asked, strict=True):
        assert request.shift is not None
        assert np.ptp(request.shift, axis=0).min() > 0.1
        wanted = plain.images + torch.from_numpy(request.shift / std)[:, :, None, None]
        torch.testing.assert_close(shifted.images, wanted, rtol=1e-5, atol=1e-5)
        assert shifted.images.is_contiguous(memory_format=torch.channels_last)


def test_without_color_shift_normalizing_is_the_plain_formula_to_the_bit() -> None:
    levels = torch.arange(3 * 256, dtype=torch.int32).remainder(256).to(torch.uint8)
    images = levels.view(2, 3, 1, 128).contiguous(memory_format=torch.channels_last)
    mean, std = (255 * torch.tensor(values) for values in (IMAGENET.mean, IMAGENET.std))
    assert torch.equal(normalize(images, mean, std), (images.float() - mean.view(3, 1, 1)) / std.view(3, 1, 1))


@pytest.mark.slow
def test_memory_stays_level(tmp_path: Path) -> None:
    """Resident memory after 20 epochs is within 5 % of that after 5, in a process of its own."""
    write_dataset(tmp_path, {"train": 200})
    code = f"""
import re, torch
from pathlib import Path
from fastflower.data.sources import layout_of
from fastflower.data.sources.kaggle import load_split
from tests.data.test_loader import epoch, loader, View
def resident(): return int(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
made = loader(load_split(Path({str(tmp_path)!r}), "train"), View(32, "random"), 8)
after = []
for number in range(20):
    epoch(made, number)
    after.append(resident())
print(after)
assert after[19] < 1.05 * after[4], after
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
