"""Where crops are: numbers against torchvision and whole-number arithmetic, and the DALI graph against the numbers."""

from __future__ import annotations

from fractions import Fraction
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nvidia.dali import fn
from nvidia.dali.pipeline import Pipeline
from torchvision.transforms.v2 import CenterCrop, Resize

from fastflower.arrays import Int32s, Ints, Singles
from fastflower.data.geometry import Frame, centered, frames, resized
from fastflower.data.pipeline import inputs, size_and_start
from fastflower.data.sampler import Request
from fastflower.data.view import View

PLACES = ("random", "center", "whole")


def by_torchvision(shape: tuple[int, int], shorter: int | None, crop: int) -> Frame:
    """What Resize and CenterCrop make of a picture whose values are its rows and columns."""
    picture: torch.Tensor = torch.zeros(2, *shape)
    if shorter is not None or min(shape) < crop:
        picture = Resize([shorter or crop], antialias=True)(picture)
    _, height, width = picture.shape
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    corner = CenterCrop(crop)(torch.stack([rows, columns]))[:, 0, 0].tolist()
    return Frame(height, width, corner[0], corner[1], crop, crop)


@settings(deadline=None, max_examples=150)
@given(
    shape=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    crop=st.integers(1, 40),
    more=st.none() | st.integers(0, 30),
)
def test_the_center_is_torchvisions(shape: tuple[int, int], crop: int, more: int | None) -> None:
    shorter = None if more is None else crop + more
    sides = None if shorter is None else np.array([shorter], np.int32)
    (frame,) = frames(np.array([shape]), sides, np.full((1, 2), 0.5, np.float32), View(crop))
    assert frame == by_torchvision(shape, shorter, crop)


@given(free=st.integers(0, 10**6))
def test_halves_are_rounded_to_the_even_number(free: int) -> None:
    assert centered(free) == round(Fraction(free, 2))


def test_random_crops_reach_every_place_equally_often_and_none_beyond() -> None:
    shares = np.linspace(0, 1, 9000, endpoint=False, dtype=np.float32)
    shapes, sides = np.full((len(shares), 2), 40), np.full(len(shares), 40, np.int32)
    kept = frames(shapes, sides, np.column_stack([shares, shares[::-1]]), View(32, "random"))
    for starts in ([frame.top for frame in kept], [frame.left for frame in kept]):
        assert np.bincount(starts).tolist() == [1000] * 9
    (last,) = frames(shapes[:1], sides[:1], np.ones((1, 2), np.float32), View(32, "random"))
    assert (last.top, last.left) == (8, 8)


def test_one_side_for_all_is_that_side_for_each() -> None:
    shapes = np.random.default_rng(0).integers(1, 900, (200, 2))
    np.testing.assert_array_equal(resized(shapes, 77, 5), resized(shapes, np.full(200, 77, np.int32), 5))
    np.testing.assert_array_equal(resized(shapes, 77, 5).min(axis=1), 77)
    np.testing.assert_array_equal(resized(shapes, None, 300).min(axis=1), np.maximum(shapes.min(axis=1), 300))


def by_dali(shapes: Ints, shorter: Int32s | None, crop_yx: Singles, view: View) -> tuple[Ints, Ints]:
    """Sizes and starts, [n, 2] each, by the operators of the graph."""
    n = len(shapes)
    request = Request(np.arange(n), shorter, crop_yx, np.zeros(n, np.int32))

    given = inputs(list(shapes.astype(np.int32)), request)[:3]  # shapes where pictures are else
    with Pipeline(batch_size=n, num_threads=1, device_id=None, prefetch_queue_depth=1) as pipeline:
        shape, sides, places = fn.external_source(source=lambda: given, num_outputs=3, batch=True)
        pipeline.set_outputs(*size_and_start(shape, sides, places, view))
    size, start = pipeline.run()
    return size.as_array(), start.as_array()


@pytest.mark.filterwarnings("ignore:The external source node")  # only a random crop has a use for positions
@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("crop", [1, 32, 224])
def test_the_graph_has_the_same_numbers(place: Literal["random", "center", "whole"], stored: bool, crop: int) -> None:
    """Of all shapes, sizes and places, those at the ends and those next to a whole number of pixels too."""
    rng, n, view = np.random.default_rng([crop, stored]), 4000, View(crop, place)
    shapes = np.exp(rng.uniform(0, np.log(4000), (n, 2))).astype(np.int64)
    shorter = None if stored else rng.integers(crop, 3 * crop + 1, n).astype(np.int32)
    shapes = shapes.clip(shapes.max(axis=1, keepdims=True) // 40 + 1)  # no side gets more than 2**31 by another's size
    free = resized(shapes, shorter, crop) - crop + 1
    drawn = rng.random((n, 2))
    whole = np.floor(drawn * (free + 1)) / free  # at a border between two places, or a step beside it
    whole = np.nextafter(whole.astype(np.float32), rng.choice([0, 1, 2], (n, 2)).astype(np.float32))
    crop_yx = np.where(rng.random((n, 2)) < 0.5, drawn, whole).clip(0, 1).astype(np.float32)
    crop_yx[:40] = np.repeat([[0.0, 1.0], [1.0, 0.0]], 20, axis=0)
    kept = frames(shapes, shorter, crop_yx, view)
    size, start = by_dali(shapes, shorter, crop_yx, view)
    np.testing.assert_array_equal(size, [(frame.height, frame.width) for frame in kept])
    if place != "whole":  # which has none
        np.testing.assert_array_equal(start, [(frame.top, frame.left) for frame in kept])
        assert len(np.unique(start)) > 20
