"""DALI on a GPU: the pictures of a CPU, and memory that stays valid while the GPU is behind."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

from fastflower.data.cache import open_cache
from fastflower.data.decoding import shapes_of
from fastflower.data.loader import Batch, Iteration, Loader, Loading
from fastflower.data.records import Records
from fastflower.data.sampler import evaluation_requests, training_requests, whole_requests
from fastflower.data.sources.kaggle import load_split
from fastflower.data.sources.tfrecord import write_tfrecord
from fastflower.data.view import IMAGENET, Engine, View
from fastflower.runtime.distributed import Ranks
from tests.conftest import example, jpeg

pytestmark = pytest.mark.gpu
BATCH, COUNT = 32, 256
# Bits are compared without the hardware decoder: which decoder takes a picture depends on its place in the batch.
GPU = Engine(device="gpu", device_id=0, threads=4, decode="whole", hw_decoder_load=0)


@pytest.fixture
def pictures(tmp_path: Path) -> Records:
    """JPEGs of many shapes, with subsampled chroma."""
    shapes = [(160 + 7 * (i % 23), 160 + 5 * (i % 31)) for i in range(COUNT)]
    records = [example(i, i % 5, jpeg(width, height, seed=i)) for i, (width, height) in enumerate(shapes)]
    write_tfrecord(tmp_path / "train" / "a.tfrec", records)
    return load_split(tmp_path, "train")


def loader(records: Records, view: View, on_gpu: bool, engine: Engine = GPU) -> Loader:
    if on_gpu:
        return Loader(records, view, BATCH, Loading(IMAGENET, engine, torch.device("cuda", 0)))
    return Loader(records, view, BATCH, Loading(IMAGENET, Engine(threads=4), torch.device("cpu")))


def epoch(loader: Loader) -> Iteration:
    requests = training_requests(len(loader.records), seed=0, epoch=0, scale=(144, 200), global_batch=BATCH)
    return loader.batches(requests)


@pytest.mark.parametrize("load", [0, 0.65, 1])
@pytest.mark.parametrize("decode", ["whole", "region"])
@pytest.mark.parametrize("place", ["center", "random", "whole"])
def test_pictures_are_those_of_the_cpu(pictures: Records, place: Any, decode: Any, load: float) -> None:
    engine = replace(GPU, decode=decode, hw_decoder_load=load)
    made = [loader(pictures, View(128, place), on_gpu, engine) for on_gpu in (False, True)]
    if place == "center":
        passes = [one.batches(evaluation_requests(COUNT, shorter=144, batch=BATCH)) for one in made]
    elif place == "whole":
        shapes = shapes_of(pictures)
        passes = [one.batches(whole_requests(shapes, shorter=144, crop=128, batch=BATCH)) for one in made]
    else:
        passes = [epoch(one) for one in made]
    to_levels = 255 * torch.tensor(IMAGENET.std).view(3, 1, 1)
    seen = 0
    for cpu, gpu in zip(*passes, strict=True):
        assert gpu.images.device.type == "cuda"
        assert gpu.images.dtype == torch.float16
        assert gpu.images.is_contiguous(memory_format=torch.channels_last)
        assert gpu.labels.tolist() == cpu.labels.tolist()
        assert gpu.indices.tolist() == cpu.indices.tolist()
        difference = ((gpu.images.float().cpu() - cpu.images) * to_levels).abs()
        # decoders differ by a level or two, fp16 by half a level; a shift by one pixel would give 5 levels and more
        assert difference.mean() < 1.5
        assert (difference > 8).float().mean() < 0.01
        seen += len(cpu.labels)
    assert seen == COUNT


@pytest.mark.parametrize("ahead", [0, 1])
def test_batches_stay_valid_while_the_gpu_is_behind(pictures: Records, ahead: int) -> None:
    """The consumer queues slow work before it reads a batch, and drops it at once: nobody may write into it before.

    It may have taken the next one before, also after the last one and in another epoch.
    """
    made = loader(pictures, View(128, "random"), on_gpu=True)
    expected = []
    for batch in epoch(made):
        torch.cuda.synchronize()
        expected.append((batch.images.clone(), batch.labels.clone()))
    slow = torch.randn(4096, 4096, device="cuda")
    late = []
    for _ in range(2):
        for batch in taken_ahead(epoch(made), ahead):
            for _ in range(20):
                slow = (slow @ slow).clamp_(-1, 1)
            late.append((batch.images.clone(), batch.labels.clone()))
    torch.cuda.synchronize()
    for (images, labels), (late_images, late_labels) in zip(expected * 2, late, strict=True):
        assert torch.equal(late_images, images)
        assert torch.equal(late_labels, labels)


def taken_ahead(batches: Iterator[Batch], ahead: int) -> Iterator[Batch]:
    """The same ones, each when so many others have been taken after it."""
    waiting: deque[Batch] = deque()
    for batch in batches:
        waiting.append(batch)
        if len(waiting) > ahead:
            yield waiting.popleft()
    while waiting:
        yield waiting.popleft()


def test_an_epoch_that_is_left_early_leaves_the_loader_usable(pictures: Records) -> None:
    made = loader(pictures, View(128, "random"), on_gpu=True)
    whole = [batch.images.clone() for batch in epoch(made)]
    for _ in range(3):
        batches = epoch(made)
        assert torch.equal(next(batches).images, whole[0])
        batches.close()
    assert all(torch.equal(batch.images, images) for batch, images in zip(epoch(made), whole, strict=True))


def test_epochs_that_are_open_at_once_are_those_that_come_one_after_another(pictures: Records) -> None:
    made = loader(pictures, View(128, "random"), on_gpu=True)
    alone = [batch.images.clone() for batch in epoch(made)]
    first, second = epoch(made), epoch(made)
    turns = [first, first, second, second, first, second, second, second, first, first, second, first]
    taken = {id(first): [], id(second): []}  # type: dict[int, list[torch.Tensor]]
    for batches in turns:
        taken[id(batches)].append(next(batches).images.clone())
    first.close()
    taken[id(second)] += [batch.images.clone() for batch in second]
    for images in taken.values():
        assert all(torch.equal(one, other) for one, other in zip(images, alone, strict=False))
    assert len(taken[id(second)]) == len(alone)


@pytest.mark.parametrize("on_gpu", [False, True])
def test_color_shift_is_that_of_the_cpu(pictures: Records, on_gpu: bool) -> None:
    """Decoded on the CPU and normalized on the GPU, or both on the GPU."""
    engine = GPU if on_gpu else Engine(threads=4)
    made = Loader(pictures, View(128, "random"), BATCH, Loading(IMAGENET, engine, torch.device("cuda", 0)))
    requests = partial(training_requests, COUNT, seed=0, epoch=0, scale=(144, 200), global_batch=BATCH)
    std, asked = torch.tensor(IMAGENET.std), list(requests(lighting=np.diag([0.2, 0.3, 0.1])))
    unshifted = [batch.images.float().cpu() for batch in made.batches(requests())]
    for images, shifted, request in zip(unshifted, made.batches(asked), asked, strict=True):
        assert request.shift is not None
        wanted = images + (torch.from_numpy(request.shift) / std)[:, :, None, None]
        assert shifted.images.dtype == (torch.float16 if on_gpu else torch.float32)
        assert shifted.images.is_contiguous(memory_format=torch.channels_last)
        # half of an fp16 step, which is at most 2**-8 for values below 8, twice
        torch.testing.assert_close(shifted.images.float().cpu(), wanted, rtol=0, atol=2**-8)


@pytest.mark.parametrize("decode", ["whole", "region"])
def test_a_picture_is_the_same_at_every_place_in_a_batch(pictures: Records, decode: Any) -> None:
    """Also in a batch by itself, as predictions of single pictures are."""
    made = loader(pictures, View(128), on_gpu=True, engine=replace(GPU, decode=decode))
    passes = made.batches(evaluation_requests(COUNT, shorter=144, batch=BATCH))
    images = torch.cat([batch.images.clone() for batch in passes])
    order = np.random.default_rng(0).permutation(COUNT)
    alone = [batch.images.clone() for batch in made.batches(evaluation_requests(BATCH, shorter=144, batch=1))]
    assert torch.equal(torch.cat(alone), images[:BATCH])
    shuffled = loader(pictures.select(order), View(128), on_gpu=True, engine=replace(GPU, decode=decode))
    for batch in shuffled.batches(evaluation_requests(COUNT, shorter=144, batch=BATCH)):
        assert torch.equal(batch.images, images[order[batch.indices]])


@pytest.mark.parametrize("decode", ["whole", "region"])
@pytest.mark.parametrize("choice", ["gpu", "ram"])
def test_pictures_decoded_once_give_the_same_batches(
    pictures: Records, choice: Literal["gpu", "ram"], decode: Any
) -> None:
    """From regions within the chroma at their borders, which the decoder may make otherwise; else bit for bit."""
    device, engine = torch.device("cuda", 0), replace(GPU, decode=decode)
    (decoded,) = open_cache(choice, [(pictures, None)], engine, Ranks(), lambda _: None, lambda _: lambda *_: None)
    assert decoded
    assert decoded.place == ("gpu" if choice == "gpu" else "cpu")
    for view in (View(128, "random"), View(128)):
        cached = Loader(pictures, view, BATCH, Loading(IMAGENET, engine, device), decoded)
        for number in range(3):
            wanted = [batch.images.clone() for batch in epoch(loader(pictures, view, True, engine))]
            images = [batch.images.clone() for batch in epoch(cached)]
            assert len(images) == len(wanted)
            for one, other in zip(images, wanted, strict=True):
                if decode == "whole":
                    assert torch.equal(one, other), f"epoch {number}"
                else:
                    assert (one - other).abs().max() < 2 / 255 / min(IMAGENET.std), f"epoch {number}"


def test_an_epoch_of_decoded_pictures_that_is_left_early_leaves_the_loader_usable(pictures: Records) -> None:
    device = torch.device("cuda", 0)
    (decoded,) = open_cache("gpu", [(pictures, None)], GPU, Ranks(), lambda _: None, lambda _: lambda *_: None)
    for prefetch in (1, 2, 4):
        loading = Loading(IMAGENET, replace(GPU, prefetch=prefetch), device)
        cached = Loader(pictures, View(128, "random"), BATCH, loading, decoded)
        whole = [batch.images.clone() for batch in epoch(cached)]
        for steps in range(4):
            for batch, images in zip(itertools.islice(epoch(cached), steps), whole, strict=False):
                assert torch.equal(batch.images, images)
        assert all(torch.equal(batch.images, images) for batch, images in zip(epoch(cached), whole, strict=True))
